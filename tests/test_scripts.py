"""The launchers: the commands they print, their errors, and tiny runs under torchrun and a stand-in for SLURM."""

import itertools
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, environment
from forked import Forked

import train_gpt
from config.load import load_config
from runtime import distributed
from training.logger import read_metrics

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/*.sbatch")])
SIZES = ("small", "medium", "large", "xl")
TINY = [
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--vocab_size=60", "--batch_size=480"),
    *("--micro_batch=60", "--warmup=1", "--eval_every=1000", "--val_windows=8", "--device=cpu", "--name=run"),
]


def run(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        env=environment() | {"PYTHON": sys.executable} | more,
        text=True,
        capture_output=True,
        timeout=120,
    )


def dry(script: str, *arguments: str) -> list[str]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    done = run(script, *arguments[:end], "--dry-run", *arguments[end:])
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def write_programs(folder: Path, texts: dict[str, str]) -> None:
    """Write programs, by their paths in a folder."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(path):
    done = subprocess.run([SHELLCHECK, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_clone_that_converts_line_ends_leaves_these_files_as_they_are(tmp_path):
    """git for Windows sets core.autocrlf=true. Bash in WSL cannot read a script with its line ends."""
    origin, texts = tmp_path / "origin", [*SCRIPTS, ROOT / ".ci/run", ROOT / "pyproject.toml", ROOT / ".gitattributes"]
    contents = {path.relative_to(ROOT): path.read_bytes() for path in texts}
    contents |= {
        Path(f"tests/a{suffix}"): b"lines\r\nof\nboth kinds" for suffix in (".npz", ".png", ".safetensors", ".bin")
    }
    for name, content in contents.items():
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        (origin / name).write_bytes(content)
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.autocrlf=true"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "files"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    clone = ["git", "clone", "-q", "-c", "core.autocrlf=true", str(origin), str(tmp_path / "clone")]
    subprocess.run(clone, check=True, capture_output=True)
    assert {name: (tmp_path / "clone" / name).read_bytes() for name in contents} == contents


@pytest.mark.parametrize("status, processes", [(0, "gpu"), (9, "1")])
def test_a_process_for_each_gpu_that_the_user_gives(tmp_path, status, processes):
    """torchrun counts the GPUs that torch may use, if the driver of a GPU answers."""
    write_programs(tmp_path, {"nvidia-smi": f"#!/bin/sh\nexit {status}\n"})
    done = run("train_small.sh", "--dry-run", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert f"--nproc_per_node={processes} " in done.stdout


def test_torchrun_without_a_gpu_that_torch_can_use_is_one_line(tmp_path):
    command = [sys.executable, "-m", "runtime.torchrun", "--nproc_per_node=gpu", str(tmp_path)]
    environ = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"torchrun: cuda is not available\.?\n", done.stderr, re.IGNORECASE)


@pytest.mark.parametrize("size", SIZES)
def test_each_size_prints_a_command_whose_batch_divides(size):
    for gpus in (1, 2, 3, 8, 32, 480):
        words = dry(f"train_{size}.sh", "--gpus", str(gpus))
        assert words[1:4] == ["-m", "runtime.torchrun", f"--nproc_per_node={gpus}"]
        assert f"config/gpt2_{size}.py" in words
        config = load_config(ROOT / f"config/gpt2_{size}.py", [w for w in words if re.match("--(data|micro|opt)", w)])
        assert (config.optimizer, config.data.path) == ("mars_m", "data/tokens/openwebtext")
        assert config.per_process(gpus) * gpus == 480


LAUNCHER = [sys.executable, "-m", "runtime.torchrun", "--standalone"]


@pytest.mark.parametrize(
    "number, seconds, killed",
    [(signal.SIGTERM, "2", True), (signal.SIGTERM, "600", False), (signal.SIGUSR1, "600", False)],
)
def test_torchrun_leaves_a_stopping_run_time_to_save(tmp_path, number, seconds, killed):
    """The process needs six seconds to save. Without a given number, torchrun leaves it 600."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, signal, time\n"
        "def save(number, frame):\n"
        "    time.sleep(6)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    raise SystemExit\n"
        f"signal.signal({int(number)}, save)\n"
        "print(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'], flush=True)\n"
        "signal.pause()\n"
    )
    given = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": seconds} if seconds != "600" else {}
    command, pipe = [*LAUNCHER, "--nproc_per_node=1", str(program)], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment() | given, stdout=pipe, stderr=pipe, text=True
    ) as launcher:
        assert launcher.stdout.readline() == f"{seconds}\n"
        launcher.send_signal(number)
        _, printed = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + number
    assert "Traceback" not in printed
    assert (tmp_path / "saved").exists() is not killed


@pytest.mark.parametrize(
    "failure, reason, code",
    [("sys.exit(3)", "ended with exit code 3", 3), ("os.kill(os.getpid(), 9)", "was ended by SIGKILL", 128 + 9)],
)
def test_torchrun_says_in_one_line_which_process_failed(tmp_path, failure, reason, code):
    program = tmp_path / "program.py"
    program.write_text(f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {failure}\ntime.sleep(60)\n")
    command = [*LAUNCHER, "--nproc_per_node=2", str(program)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == f"torchrun: process 1 {reason}; its messages, if it had any, are above"
    assert "Traceback" not in done.stderr


TRAINER = """#!/bin/bash
case "$*" in
*train_gpt.py*)
    trap 'kill %1; echo "stopped at step 1"; echo "run     runs/quick"; exit' INT
    echo "step 1"
    sleep $PAUSE &
    wait
    echo "final   validation loss 1.5"
    echo "run     runs/quick"
    ;;
*) echo "called $*" ;;
esac
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_quickstart_samples_from_a_finished_run_and_shows_how_an_interrupted_one_ends(tmp_path, interrupted):
    """Ctrl-C reaches every program of the script. A stand-in for Python takes the place of the trainer."""
    quickstart = (ROOT / "scripts" / "quickstart.sh").read_text()
    write_programs(tmp_path, {"scripts/quickstart.sh": quickstart, "scripts/setup.sh": "", ".venv/bin/python": TRAINER})
    command = ["bash", str(tmp_path / "scripts/quickstart.sh")]
    env = environment() | {"PAUSE": str(60 * interrupted)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as quickstart:
        lines = []
        for line in quickstart.stdout:
            lines.append(line.rstrip())
            if interrupted and line == "step 1\n":
                os.killpg(quickstart.pid, signal.SIGINT)
    ending = ["stopped at step 1", "run     runs/quick"]
    if not interrupted:
        ending = ["sample", "called -m eval.sample runs/quick --max-tokens 400", "run folder: runs/quick"]
    assert lines[-len(ending) :] == ending


PYTHON_OF_A_VERSION = f"""#!/bin/bash
[[ $1 == -c ]] && exec {sys.executable} -c "import sys; sys.version_info = ($VERSION); exec(sys.argv[1])" "$2"
echo "$*"
[[ $2 != venv ]] || {{ mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; }}
"""


@pytest.mark.parametrize("version, is_new_enough", [("3, 10, 14", False), ("3, 11, 4", False), ("3, 11, 5", True)])
@pytest.mark.parametrize("set_up_before", [False, True])
def test_setup_refuses_a_python_whose_workers_can_hang(tmp_path, version, is_new_enough, set_up_before):
    """An environment of an older Python, which was set up before, is not used either."""
    files = {"scripts/setup.sh": (ROOT / "scripts" / "setup.sh").read_text(), "python": PYTHON_OF_A_VERSION}
    if set_up_before:
        files |= {".venv/bin/python": PYTHON_OF_A_VERSION, ".venv/requirements.installed": "torch\n"}
    write_programs(tmp_path, files | {"requirements.txt": "torch\n"})
    command = ["bash", str(tmp_path / "scripts/setup.sh")]
    env = environment() | {"PYTHON": str(tmp_path / "python"), "VERSION": version}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    installed = "-m pip install --quiet --disable-pip-version-check -r requirements.txt" in done.stdout
    assert (done.returncode, installed) == (0 if is_new_enough else 1, is_new_enough and not set_up_before)
    if not is_new_enough:
        assert done.stderr.startswith(f"setup: {tmp_path}/python is missing or older than Python 3.11.5; name another")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("build", ["", "cpu", "cuda"])
def test_the_tests_of_cuda_code_use_an_environment_with_cuda_or_set_one_up(tmp_path, build):
    """Stand-ins for Python are named after the build of torch in their environment."""
    python = '#!/bin/bash\n[[ $0 == *cuda* || {build} == cuda ]] || exit 1\n[[ $1 == -c ]] || echo "$0 $*"'
    files = {"scripts/test_cuda.sh": (ROOT / "scripts" / "test_cuda.sh").read_text()}
    files["scripts/setup.sh"] = "echo sets up $VENV"
    files[".venv-cuda/bin/python"] = python.format(build="cuda")
    if build:
        files[".venv/bin/python"] = python.format(build=build)
    write_programs(tmp_path, files)
    done = subprocess.run(["bash", str(tmp_path / "scripts/test_cuda.sh"), "-x"], capture_output=True, text=True)
    chosen = ".venv" if build == "cuda" else ".venv-cuda"
    assert done.stdout.splitlines() == [f"sets up {chosen}", f"{chosen}/bin/python -m pytest -m cuda -x"], done.stderr


def test_options_and_arguments_after_the_dashes_reach_the_trainer():
    words = dry("train_small.sh", "--optimizer", "adamw", "--dataset=/data/edu", "--gpus=4", "--", "--name=a b")
    assert "--nproc_per_node=4" in words
    assert words[-5:] == ["config/gpt2_small.py", "--data.path=/data/edu", "--optimizer", "adamw", "--name=a b"]
    assert dry("train_small.sh", "--name", "small")[-2:] == ["--name", "small"]
    assert dry("train_xl.sh", "--gpus", "8", "--preflight")[-1] == "--preflight"
    assert dry("train_xl.sh", "--gpus", "8", "--seed=2", "--lr", "1e-3")[-3:] == ["--seed=2", "--lr", "1e-3"]


@pytest.mark.parametrize("job", [0, 11_999, 12_000, 39_999, 2**31 - 1])
def test_the_port_of_a_job_is_below_those_that_linux_gives_out(tmp_path, job):
    write_programs(tmp_path, {"srun": "#!/bin/sh\necho port=$MASTER_PORT\n"})
    path = f"{tmp_path}:{os.environ['PATH']}"
    facts = dict(SLURM_JOB_ID=str(job), SLURM_SUBMIT_DIR=str(ROOT), MASTER_PORT="")
    done = run("train.sbatch", "small", PATH=path, **facts)
    assert 1024 <= int(done.stdout.partition("port=")[2]) < 32768


def test_several_machines_meet_at_one_address():
    words = dry("train_multinode.sh", "medium", "--nodes", "4", "--gpus", "8", "--rendezvous", "first:29400")
    assert {"--nnodes=4", "--nproc_per_node=8", "--rdzv_backend=c10d", "--rdzv_endpoint=first:29400"} < set(words)
    assert "--rdzv_id=gpt2_medium" in words


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("train_small.sh", ["--gpus", "many"], "--gpus=many: must be a whole number from 1"),
        ("train_small.sh", ["--gpus", "9" * 20], "must be a whole number from 1 to 999999"),
        ("train_small.sh", ["--gpus"], "--gpus needs a value"),
        ("train.sh", ["tiny"], '"tiny" is not a size; choose small, medium, large or xl'),
        ("train.sh", [], '"" is not a size'),
        ("train_multinode.sh", ["small", "--nodes=2"], "--nodes 2 needs --rendezvous"),
        ("train_multinode.sh", ["small"], "needs --nodes N and --rendezvous HOST:PORT"),
        ("train.sh", ["small", "--nodes", "2", "--gpus", "1"], "--nodes 2 needs --rendezvous"),
    ],
)
def test_errors_are_one_line(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr.strip()), done.stderr
    assert done.stderr.count("\n") == 1


def test_help_describes_every_option():
    printed = run("train_small.sh", "--help").stdout
    for option in ("--dataset", "--gpus", "--nodes", "--rendezvous", "--dry-run"):
        assert f"\n  {option}" in printed


def test_a_tiny_run_on_two_processes(dataset, tmp_path):
    done = run(
        *("train_small.sh", "--gpus", "2", "--dataset", str(dataset), "--optimizer", "mars"),
        *("--", *TINY, "--steps=2", f"--log.folder={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(sys.executable)
    assert "480 sequences = 2 processes x 60 x 4 accumulated" in done.stdout
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r][-1] == 2


SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
    echo $! >>"$FAKE/tasks"
done
wait
"""
SCANCEL = """#!/bin/bash
xargs kill "${1/--signal=/-}" <"$FAKE/tasks"
rm "$FAKE/tasks"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$FAKE/requests"
"""


def test_a_task_of_a_job_becomes_a_process_of_the_run(tmp_path):
    facts = "SLURM_PROCID=11 SLURM_LOCALID=3 SLURM_NTASKS=16 SLURM_NTASKS_PER_NODE=8"
    python = "#!/bin/sh\necho process $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE"
    python += ", $SRUN_CPUS_PER_TASK cores, $TORCHINDUCTOR_COMPILE_THREADS workers"
    write_programs(tmp_path, {"srun": f'#!/bin/bash\n{facts} "${{@:2}}"', "python": python})
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = dict(PATH=path, PYTHON=str(tmp_path / "python"), SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="6")
    done = run("train.sbatch", "small", **job)
    assert done.stdout.splitlines()[-1] == "process 11 3 16 8, 6 cores, 6 workers", done.stderr


@pytest.mark.parametrize("status, requeued", [(0, True), (128 + signal.SIGUSR1, True), (1, False)])
def test_a_stopped_job_goes_back_into_the_queue_unless_it_failed(tmp_path, status, requeued):
    """srun, scancel and scontrol are stand-ins. A run that is stopped before its first step ends with 138."""
    srun = f'#!/bin/bash\ntouch "$FAKE/running"; until [ -e "$FAKE/cancelled" ]; do sleep 0.1; done; exit {status}'
    scancel = '#!/bin/bash\ntouch "$FAKE/cancelled"'
    write_programs(tmp_path, {"srun": srun, "scancel": scancel, "scontrol": SCONTROL})
    variables = environment() | {"FAKE": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77"}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", str(ROOT / "scripts" / "train.sbatch"), "small"], env=variables)
    while not (tmp_path / "running").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == status
    assert ("requeue 77" in (tmp_path / "requests").read_text()) is requeued


def test_a_job_with_a_stop_signal_saves_requeues_and_resumes(dataset, tmp_path):
    """srun, scancel and scontrol are stand-ins; the signal, the trainers and their checkpoints are real."""
    write_programs(tmp_path, {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL})
    variables = environment() | {"PYTHON": sys.executable, "FAKE": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT)}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "MASTER_PORT": "29617"}
    command = ["bash", str(ROOT / "scripts" / "train.sbatch"), "small", "--dataset", str(dataset), "--", *TINY]
    command += [f"--log.folder={tmp_path / 'runs'}", "--log.every=1", "--checkpoint.every=100000", "--wandb=offline"]
    pipes = dict(env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"

    process = subprocess.Popen([*command, "--steps=100"], **pipes)
    deadline = time.monotonic() + 200
    while not (metrics.exists() and any(r.get("step", 0) >= 3 for r in read_metrics(metrics))):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "back into the queue" in output
    assert (tmp_path / "requests").read_text().splitlines()[-1] == "requeue 77"

    (checkpoint,) = (tmp_path / "runs" / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name[5:])
    assert step < 100
    again = subprocess.run([*command, "--steps=100"], timeout=300, **pipes)
    assert again.returncode == 0, again.stdout
    assert f"continuing at step {step}" in again.stdout
    assert "back into the queue" not in again.stdout
    assert [r["step"] for r in read_metrics(metrics) if "loss" in r] == list(range(1, 101))
    if find_spec("wandb"):
        starts = [p.name.rpartition("-")[2] for p in (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*")]
        assert starts == [(tmp_path / "runs" / "run" / "wandb_id").read_text()] * 2


def test_the_wandb_sweep_recipe_trains_with_the_arguments_of_an_agent(dataset, tmp_path, monkeypatch):
    """wandb's own functions make the command of each point of the grid; a stand-in for its server is not needed."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    recipe = yaml.safe_load((ROOT / "scripts/wandb_sweep.yaml").read_text())
    names, values = recipe["parameters"].keys(), [p["values"] for p in recipe["parameters"].values()]
    commands = []
    for point in itertools.product(*values):
        arguments = {name: {"value": value} for name, value in zip(names, point, strict=True)}
        flags = utils.create_sweep_command_args({"args": arguments})["args"]
        command = [part for word in recipe["command"] for part in (flags if word == "${args}" else [word])]
        assert command[:3] == ["${env}", "python", "train_gpt.py"]
        commands.append(command[3:])
    runs = [load_config(command[0], command[1:]) for command in commands]
    assert len({run.name for run in runs}) == len(runs) == 18
    assert {(run.optim.lr, run.optim.gamma, run.seed) for run in runs} >= {(0.005, 0.025, 1), (0.02, 0.1, 2)}

    given: dict = {}
    run = SimpleNamespace(
        log=lambda numbers, step: given.update(numbers), define_metric=lambda *_, **__: None, finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: given.update(settings) or run))
    monkeypatch.setenv("WANDB_RUN_ID", "id-of-the-agent")
    tiny = ["--steps=2", "--eval_every=2", f"--data.path={dataset}", f"--log.folder={tmp_path}", *TINY]
    train_gpt.main([*commands[0], *tiny, "--batch_size=4", "--micro_batch=4"])
    assert given["id"] == "id-of-the-agent"
    assert given["config"]["optim"]["lr"] == 0.005
    assert recipe["metric"]["name"] in given


def lines_of(printed):
    """Lines without those of a step, and without those of torchrun itself."""
    of_torchrun = re.compile(r"[WE]\d{4} .*torch/distributed/elastic")
    return [line for line in printed.splitlines() if not line.startswith("step ") and not of_torchrun.match(line)]


def missing(rank: int, process: int) -> str:
    return (
        f"train_gpt: rank {rank} (process {process} on {platform.node()}): no answer; the same command continues from"
    )


def test_every_surviving_rank_says_in_one_line_which_rank_was_killed(arguments):
    """Under the launcher, which gives them time for it."""
    command = [*LAUNCHER, "--nproc_per_node=3", "train_gpt.py", *arguments, "--steps=100000", "--micro_batch=1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as launcher:
        for line in launcher.stdout:
            if line.startswith("step      5"):
                break
        ranks = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        victim = next(p for p in ranks if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
        os.kill(int(victim), signal.SIGKILL)
        start = time.monotonic()
        printed, _ = launcher.communicate(timeout=120)
        assert time.monotonic() - start < 100
    assert launcher.returncode != 0
    assert 1 <= sum(line.startswith(missing(1, victim)) for line in lines_of(printed)) <= 2, printed
    assert len(lines_of(printed)) <= 3, printed  # the last one is the launcher's


def train_until_rank_1_hangs(arguments, stopped: bool, file: Path) -> None:
    """After step 6, the whole rank stops or its main thread does. Its process id is in a file."""
    distributed.BEAT, distributed.TIMEOUT = 0.5, timedelta(seconds=4)
    update = train_gpt.Trainer.update

    def hanging(trainer):
        update(trainer)
        if os.environ["RANK"] == "1" and trainer.step == 6:
            file.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP) if stopped else time.sleep(1000)

    train_gpt.Trainer.update = hanging
    train_gpt.main(arguments)


@pytest.mark.parametrize("stopped", [True, False])
def test_every_surviving_rank_says_in_one_line_which_rank_hangs(arguments, tmp_path, stopped):
    run = Forked(train_until_rank_1_hangs, [*arguments, "--micro_batch=1"], stopped, tmp_path / "process", processes=3)
    printed, _ = run.communicate(timeout=100)
    assert run.returncode != 0
    lines = [line for line in lines_of(printed) if not line.startswith("saved ")]
    told = [line for line in lines if line.startswith(missing(1, int((tmp_path / "process").read_text())))]
    assert 1 <= len(told) <= 2, printed
    assert lines[-len(told) :] == told, printed
