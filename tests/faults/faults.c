// Preloaded into a process, lets one of its operations on files fail, or kills the process before it.
//
// faults_arm(folder, at, error): from now on, operations that change something below `folder` are counted; before the
// one with number `at` (from 1) the process gets SIGKILL if error is 0, and else this operation fails with `error`.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static long count, strike_at;
static int strike_error;

void faults_arm(const char *folder, long at, int error) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    count = 0, strike_at = at, strike_error = error;
}

long faults_count(void) { return count; }

// Counts an operation on a path, relative to a folder's descriptor; 1 if it must fail.
static int struck(int folder, const char *path) {
    char full[2 * PATH_MAX], link[64];
    if (!prefix[0]) return 0;
    if (path && path[0] == '/') {
        snprintf(full, sizeof full, "%s", path);
    } else {
        if (folder == AT_FDCWD) {
            if (!getcwd(full, PATH_MAX)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, full, PATH_MAX);
            if (n < 0) return 0;
            full[n] = 0;
        }
        if (path) snprintf(full + strlen(full), PATH_MAX, "/%s", path);
    }
    if (strncmp(full, prefix, strlen(prefix))) return 0;
    if (++count != strike_at) return 0;
    if (!strike_error) kill(getpid(), SIGKILL);
    errno = strike_error;
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, arguments, call, folder, path) \
    type name arguments { return struck(folder, path) ? -1 : NEXT(name) call; }

WRAP(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n), fd, NULL)
WRAP(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), fd, NULL)
WRAP(ssize_t, sendfile, (int to, int from, off_t *at, size_t n), (to, from, at, n), to, NULL)
WRAP(ssize_t, copy_file_range, (int from, off64_t *a, int to, off64_t *b, size_t n, unsigned f), (from, a, to, b, n, f),
     to, NULL)
WRAP(int, fsync, (int fd), (fd), fd, NULL)
WRAP(int, ftruncate, (int fd, off_t n), (fd, n), fd, NULL)
WRAP(int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, from)
WRAP(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), a, from)
WRAP(int, unlink, (const char *path), (path), AT_FDCWD, path)
WRAP(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path)
WRAP(int, rmdir, (const char *path), (path), AT_FDCWD, path)
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
WRAP(int, mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path)
WRAP(int, chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)

#define WRAP_OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && struck(AT_FDCWD, path)) return -1; \
        return NEXT(name)(path, flags, mode); \
    }
WRAP_OPEN(open)
WRAP_OPEN(open64)

#define WRAP_OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && struck(folder, path)) return -1; \
        return NEXT(name)(folder, path, flags, mode); \
    }
WRAP_OPENAT(openat)
WRAP_OPENAT(openat64)
