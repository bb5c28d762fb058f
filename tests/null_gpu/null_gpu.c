// A GPU that does not exist, for tests of CUDA code on machines without one.
//
// This library is preloaded under torch's ordinary CUDA wheel. It replaces the functions of the CUDA runtime, the
// driver, cuBLAS, cuSOLVER and NCCL that torch and Triton call. Everything above them is the real code.
//
//   Real:     memory addresses, the limit of device memory, and copies of at most COPY_LIMIT bytes.
//   Counted:  kernel launches by name, calls that make the host wait for the device, and device memory.
//   Nothing:  kernels, streams, events and communication. They succeed at once and compute nothing.
//
// So the numbers on this device have no meaning. Device memory is zero until a copy writes to it. cuDNN is missing.
//
// Environment: NULL_GPU_COUNT (1), NULL_GPU_MEMORY (85029158912 bytes), NULL_GPU_NAME ("NVIDIA H100 80GB HBM3") and
// NULL_GPU_SM (90). Structures and numbers are those of CUDA 13. They are declared here, because the wheels contain
// only a part of CUDA's headers. A function declares only the arguments that it uses; callers may pass more.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, UNKNOWN_KERNEL = 98 };  // cudaError_t
enum { MOST_DEVICES = 16, COPY_LIMIT = 1 << 20, GRANULARITY = 2 << 20 };  // the last two in bytes
enum { CUDA_VERSION = 13000, NCCL_VERSION = 22907, CUBLASLT_VERSION = 130101 };

// Most functions are of one of these kinds. STORES writes a value to the first argument, STORES_SECOND to the second.
// NEW_HANDLE makes a stream, event, module or similar; it is never freed, because a test makes few of them.
#define NOTHING(name)              int name(void) { return SUCCESS; }
#define STORES(name, value)        int name(int *out) { return *out = (value), SUCCESS; }
#define STORES_SECOND(name, value) int name(void *first, int *out) { return *out = (value), SUCCESS; }
#define NEW_HANDLE(name)           int name(void **out) { return *out = calloc(1, 16), SUCCESS; }
#define WAITS(name)                int name(void) { return count_wait(); }
#define LAUNCHES_FIRST(name)       int name(void *kernel) { return count_launch(kernel); }
#define LAUNCHES_SECOND(name)      int name(void *config, void *kernel) { return count_launch(kernel); }
#define LAUNCHES(name)             int name(void) { return count_launch_of_library(#name); }

// ---- settings

static int device_count, sm_version;
static size_t device_memory;
static char device_name[256];

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

__attribute__((constructor)) static void read_settings(void) {
    device_count = atoi(setting("NULL_GPU_COUNT", "1"));
    device_memory = strtoull(setting("NULL_GPU_MEMORY", "85029158912"), NULL, 10);
    sm_version = atoi(setting("NULL_GPU_SM", "90"));
    snprintf(device_name, sizeof device_name, "%s", setting("NULL_GPU_NAME", "NVIDIA H100 80GB HBM3"));
}

// ---- counters: launches in a hash table of kernels, and host waits

enum { BUCKETS = 1 << 16 };

struct kernel {
    const void *key;  // what the caller passes to a launch: the host's stub, a handle, or a library function's name
    char *name;
    long launches;
    struct kernel *next;  // in the same bucket
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // for all tables
static struct kernel *kernels[BUCKETS];
static long host_waits;

static struct kernel **bucket_of(const void *key) { return &kernels[((uintptr_t)key * 0x9E3779B97F4A7C15u) >> 48]; }

static void add_kernel(const void *key, const char *name) {
    struct kernel *kernel = malloc(sizeof *kernel), **bucket = bucket_of(key);
    pthread_mutex_lock(&lock);
    *kernel = (struct kernel){key, strdup(name), 0, *bucket};
    *bucket = kernel;
    pthread_mutex_unlock(&lock);
}

static int count_launch(const void *key) {
    pthread_mutex_lock(&lock);
    struct kernel *kernel = *bucket_of(key);
    while (kernel && kernel->key != key) kernel = kernel->next;
    if (kernel) kernel->launches++;
    pthread_mutex_unlock(&lock);
    return kernel ? SUCCESS : UNKNOWN_KERNEL;
}

static int count_launch_of_library(const char *function) {
    if (count_launch(function) == SUCCESS) return SUCCESS;
    add_kernel(function, function);
    return count_launch(function);
}

static int count_wait(void) {
    __atomic_fetch_add(&host_waits, 1, __ATOMIC_RELAXED);
    return SUCCESS;
}

// ---- memory: reserved addresses, which cost no host memory until something is written to them

enum kind { ON_DEVICE, ON_HOST, ADDRESSES };  // of the last one, parts are mapped to device memory

struct block {
    char *start;
    size_t size;
    int device;
    enum kind kind;
    struct block *next;
};

static struct block *blocks;
static size_t used[MOST_DEVICES], peak[MOST_DEVICES];
static __thread int current_device, last_error;

static int fail(int error) { return last_error = error; }

static void add_block(void *start, size_t size, enum kind kind) {
    struct block *block = malloc(sizeof *block);
    pthread_mutex_lock(&lock);
    *block = (struct block){start, size, current_device, kind, blocks};
    blocks = block;
    pthread_mutex_unlock(&lock);
}

// The place in the list that points to the block with an address. Needs the lock.
static struct block **link_to(const char *address) {
    struct block **link = &blocks;
    while (*link && !((*link)->start <= address && address < (*link)->start + (*link)->size)) link = &(*link)->next;
    return link;
}

static struct block find_block(const void *address) {  // of size 0 if there is none
    pthread_mutex_lock(&lock);
    struct block *block = *link_to(address), found = block ? *block : (struct block){0};
    pthread_mutex_unlock(&lock);
    return found;
}

static size_t remove_block(const void *start) {  // returns its size
    pthread_mutex_lock(&lock);
    struct block **link = link_to(start), *block = *link, removed = block ? *block : (struct block){0};
    if (block) *link = block->next;
    if (removed.kind == ON_DEVICE) used[removed.device] -= removed.size;
    pthread_mutex_unlock(&lock);
    free(block);
    return removed.size;
}

static int reserve(void **start, size_t size, enum kind kind) {
    *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*start == MAP_FAILED) return fail(OUT_OF_MEMORY);
    add_block(*start, size, kind);
    return SUCCESS;
}

static int release(void *start) {
    size_t size = start ? remove_block(start) : 0;
    if (size) munmap(start, size);
    return SUCCESS;
}

static int take(int device, size_t size) {  // returns whether the device has so much memory left
    size_t *in_use = &used[device], *highest = &peak[device];
    pthread_mutex_lock(&lock);
    int fits = *in_use + size <= device_memory;
    if (fits) *in_use += size;
    if (*in_use > *highest) *highest = *in_use;
    pthread_mutex_unlock(&lock);
    return fits;
}

int cudaMalloc(void **start, size_t size) {
    if (!size) return *start = NULL, SUCCESS;  // as the real function
    size = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    return take(current_device, size) ? reserve(start, size, ON_DEVICE) : fail(OUT_OF_MEMORY);
}

int cudaFree(void *start) {
    if (start) count_wait();  // the real function waits, too
    return release(start);
}

int cudaHostAlloc(void **start, size_t size) { return reserve(start, size ? size : 1, ON_HOST); }
int cudaFreeHost(void *start) { return release(start); }
int cudaHostRegister(void *start, size_t size) { return add_block(start, size, ON_HOST), SUCCESS; }
int cudaHostUnregister(void *start) { return remove_block(start), SUCCESS; }

// The driver's virtual memory, which torch uses with expandable segments: it reserves addresses, creates memory, maps
// some to the other, and undoes this. Addresses here always have memory behind them, so only the amount is counted.

struct allocation {
    size_t size;
    int device;
};

int cuMemAddressReserve(void **start, size_t size) { return reserve(start, size, ADDRESSES); }
int cuMemAddressFree(void *start) { return release(start); }
int cuMemGetAllocationGranularity(size_t *out) { return *out = GRANULARITY, SUCCESS; }

int cuMemCreate(struct allocation **out, size_t size, const int *properties) {
    int device = properties[3];
    if (!take(device, size)) return OUT_OF_MEMORY;
    *out = malloc(sizeof **out);
    **out = (struct allocation){size, device};
    return SUCCESS;
}

int cuMemRelease(struct allocation *allocation) {
    pthread_mutex_lock(&lock);
    used[allocation->device] -= allocation->size;
    pthread_mutex_unlock(&lock);
    free(allocation);
    return SUCCESS;
}

int cuMemUnmap(void *start, size_t size) { return madvise(start, size, MADV_DONTNEED); }  // new memory is zero

NOTHING(cuMemMap) NOTHING(cuMemSetAccess)

int cudaMemGetInfo(size_t *available, size_t *total) {
    *total = device_memory;
    *available = device_memory - used[current_device];
    return SUCCESS;
}

enum { UNREGISTERED, HOST, DEVICE };  // kinds of memory

struct pointer_attributes {
    int kind, device;
    const void *on_device, *on_host;
    long reserved[8];
};

int cudaPointerGetAttributes(struct pointer_attributes *out, const void *address) {
    struct block block = find_block(address);
    *out = (struct pointer_attributes){.kind = UNREGISTERED, .device = -2};
    if (block.size) *out = (struct pointer_attributes){block.kind == ON_HOST ? HOST : DEVICE, block.device, address};
    if (block.kind == ON_HOST) out->on_host = address;
    return SUCCESS;
}

int cuPointerGetAttribute(uintptr_t *out, int attribute, uintptr_t address) {  // Triton asks for the device's address
    *out = address;
    return find_block((void *)address).size ? SUCCESS : 1;
}

// ---- copies: small ones are real, so that flags, step numbers and tokens keep their values

static int copy(void *to, const void *from, size_t size) {
    if (size <= COPY_LIMIT) memmove(to, from, size);
    return SUCCESS;
}

int cudaMemcpy(void *to, const void *from, size_t size) { return count_wait(), copy(to, from, size); }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { return copy(to, from, size); }
int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size) {
    return copy(to, from, size);
}

int cudaMemsetAsync(void *start, int value, size_t size) {
    if (size <= COPY_LIMIT) memset(start, value, size);
    return SUCCESS;
}

int cudaMemset(void *start, int value, size_t size) { return cudaMemsetAsync(start, value, size); }

int cudaGetSymbolAddress(void **address) {
    static char variable[1 << 16];
    return *address = variable, SUCCESS;
}

NOTHING(cudaMemcpyToSymbol)

// ---- devices: the properties of an H100, or of an A100 below sm_90

static int attribute(int number) {  // as the driver's header numbers them
    int shared_memory = sm_version >= 90 ? 232448 : 166912;
    switch (number) {
        case 1: case 2: case 3: return 1024;       // threads of a block, and its largest sizes in x and y
        case 4: return 64;                         // largest size of a block in z
        case 5: return 0x7fffffff;                 // largest size of a grid in x
        case 6: case 7: return 65535;              // and in y and z
        case 8: return 49152;                      // shared memory of a block by default
        case 10: return 32;                        // threads of a warp
        case 12: case 82: return 65536;            // registers of a block and of a multiprocessor
        case 13: return 1980000;                   // clock in kHz
        case 16: return sm_version >= 90 ? 132 : 108;  // multiprocessors
        case 36: return 2619000;                   // clock of the memory in kHz
        case 37: return 5120;                      // width of the memory bus in bits
        case 38: return 50 << 20;                  // level 2 cache
        case 39: return 2048;                      // threads of a multiprocessor
        case 75: return sm_version / 10;           // compute capability
        case 76: return sm_version % 10;
        case 81: return shared_memory + 1024;      // shared memory of a multiprocessor
        case 97: return shared_memory;             // shared memory of a block that asks for more
        case 106: return 32;                       // blocks of a multiprocessor
        default: return 0;
    }
}

struct device_properties {  // cudaDeviceProp
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t memory, shared_memory;
    int registers, warp_size;
    size_t pitch;
    int threads_per_block, block_sizes[3], grid_sizes[3];
    size_t constant_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch;
    int processors, integrated, maps_host_memory, texture_limits[38];
    size_t surface_alignment;
    int concurrent_kernels, ecc, bus, slot, domain, tcc, copy_engines, unified_addressing, bus_width, l2_cache;
    int persisting_l2_cache, threads_per_processor, stream_priorities, global_l1, local_l1;
    size_t shared_memory_per_processor;
    int registers_per_processor, managed_memory, boards[2], native_atomics, pageable[2], preemption, host_pointers;
    int cooperative_launch;
    size_t shared_memory_optin;
    int page_tables, direct_access, blocks_per_processor, policy_window;
    size_t reserved_shared_memory;
    int rest[76];
};

_Static_assert(sizeof(struct device_properties) == 1008, "the size of cudaDeviceProp in CUDA 13");

int cudaGetDeviceProperties(struct device_properties *p, int device) {
    *p = (struct device_properties){.memory = device_memory, .uuid = {device}, .bus = device, .texture_alignment = 512};
    memcpy(p->name, device_name, sizeof p->name);
    p->shared_memory = attribute(8), p->shared_memory_optin = attribute(97), p->warp_size = attribute(10);
    p->shared_memory_per_processor = attribute(81), p->blocks_per_processor = attribute(106);
    p->registers = attribute(12), p->registers_per_processor = attribute(82);
    p->threads_per_block = attribute(1), p->threads_per_processor = attribute(39);
    for (int i = 0; i < 3; i++) p->block_sizes[i] = attribute(2 + i), p->grid_sizes[i] = attribute(5 + i);
    p->major = attribute(75), p->minor = attribute(76), p->processors = attribute(16);
    p->bus_width = attribute(37), p->l2_cache = attribute(38), p->copy_engines = 3;
    p->maps_host_memory = p->concurrent_kernels = p->unified_addressing = p->cooperative_launch = 1;
    return SUCCESS;
}

int cudaGetDeviceCount(int *count) {
    if (!*setting("CUDA_VISIBLE_DEVICES", "all")) device_count = 0;  // a process may hide the devices before it uses one
    return *count = device_count, device_count ? SUCCESS : fail(NO_DEVICE);
}

int cudaSetDevice(int device) {
    if (device < 0 || device >= device_count) return fail(INVALID_DEVICE);
    return current_device = device, SUCCESS;
}

int cudaDeviceGetAttribute(int *out, int number) { return *out = attribute(number), SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, SUCCESS; }
int cudaDeviceGetPCIBusId(char *out, int size, int device) {
    return snprintf(out, size, "0000:%02x:00.0", device), SUCCESS;
}

int cudaPeekAtLastError(void) { return last_error; }
int cudaGetLastError(void) {
    int error = last_error;
    return last_error = SUCCESS, error;
}

const char *cudaGetErrorString(int error) { return error == OUT_OF_MEMORY ? "out of memory" : "error of the null GPU"; }
const char *cudaGetErrorName(int error) { return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaError"; }

STORES(cudaGetDevice, current_device)
STORES(cudaDeviceCanAccessPeer, 1)
STORES(cudaDriverGetVersion, CUDA_VERSION)
STORES(cudaRuntimeGetVersion, CUDA_VERSION)
WAITS(cudaDeviceSynchronize)
NOTHING(cudaDeviceEnablePeerAccess)
NOTHING(cudaProfilerStart)
NOTHING(cudaProfilerStop)

// ---- streams and events: everything is complete at once

NEW_HANDLE(cudaStreamCreate) NEW_HANDLE(cudaStreamCreateWithFlags) NEW_HANDLE(cudaStreamCreateWithPriority)
NEW_HANDLE(cudaEventCreate) NEW_HANDLE(cudaEventCreateWithFlags)
WAITS(cudaStreamSynchronize) WAITS(cudaEventSynchronize)
STORES_SECOND(cudaStreamGetPriority, 0)
STORES_SECOND(cudaStreamIsCapturing, 0) STORES_SECOND(cudaStreamGetCaptureInfo, 0)
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery) NOTHING(cudaStreamWaitEvent)
NOTHING(cudaEventDestroy) NOTHING(cudaEventQuery) NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaThreadExchangeStreamCaptureMode)

int cudaEventElapsedTime(float *milliseconds) { return *milliseconds = 1, SUCCESS; }

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) {
    return function(argument), SUCCESS;
}

int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *argument) {
    return function(stream, SUCCESS, argument), SUCCESS;
}

// ---- kernels of torch: code that the compiler generates registers them by name when a library is loaded

void **__cudaRegisterFatBinary(void) {
    static void *handle;
    return &handle;
}

void __cudaRegisterFunction(void **binary, const void *stub, char *symbol, const char *name) { add_kernel(stub, name); }

NOTHING(__cudaInitModule) NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaUnregisterFatBinary)
NOTHING(__cudaRegisterVar) NOTHING(cudaFuncSetAttribute)

struct size3 {
    unsigned x, y, z;
};

static __thread struct size3 grid_size, block_size;  // a launch in C++ pushes these four, and the stub pops them
static __thread size_t launch_memory;
static __thread void *launch_stream;

unsigned __cudaPushCallConfiguration(struct size3 grid, struct size3 block, size_t memory, void *stream) {
    grid_size = grid, block_size = block, launch_memory = memory, launch_stream = stream;
    return SUCCESS;
}

int __cudaPopCallConfiguration(struct size3 *grid, struct size3 *block, size_t *memory, void **stream) {
    *grid = grid_size, *block = block_size, *memory = launch_memory, *stream = launch_stream;
    return SUCCESS;
}

int __cudaGetKernel(const void **kernel, const void *stub) { return *kernel = stub, SUCCESS; }

LAUNCHES_FIRST(__cudaLaunchKernel) LAUNCHES_FIRST(cudaLaunchKernel) LAUNCHES_SECOND(cudaLaunchKernelExC)

struct function_attributes {  // cudaFuncAttributes
    size_t shared_memory, constant_memory, local_memory;
    int threads, registers, ptx_version, binary_version, cache_mode, shared_memory_optin, rest[24];
};

int cudaFuncGetAttributes(struct function_attributes *out) {
    *out = (struct function_attributes){.threads = 1024, .registers = 32, .shared_memory_optin = attribute(97)};
    out->ptx_version = out->binary_version = sm_version;
    return SUCCESS;
}

STORES(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, 8)

// ---- the driver, which Triton calls

static char contexts[MOST_DEVICES];  // the address of an element stands for a context

int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &contexts[device], SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, SUCCESS; }
int cuCtxGetCurrent(void **context) { return *context = &contexts[current_device], SUCCESS; }
int cuDeviceGet(int *device, int index) { return *device = index, SUCCESS; }
int cuDeviceGetName(char *out, int size) { return snprintf(out, size, "%s", device_name), SUCCESS; }
int cuDeviceGetAttribute(int *out, int number) { return *out = attribute(number), SUCCESS; }
int cuCtxGetLimit(size_t *limit) { return *limit = 0, SUCCESS; }
int cuGetErrorString(int error, const char **out) { return *out = "error of the null GPU", SUCCESS; }

int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = calloc(1, 1);
    add_kernel(*function, name);
    return SUCCESS;
}

int cuFuncGetAttribute(int *out, int number) {  // 0: largest block, 4: registers
    return *out = number == 0 ? 1024 : number == 4 ? 32 : 0, SUCCESS;
}

STORES(cuDriverGetVersion, CUDA_VERSION) STORES(cuDeviceGetCount, device_count) STORES(cuCtxGetDevice, current_device)
STORES(cuOccupancyMaxActiveBlocksPerMultiprocessor, 8) STORES(cuOccupancyMaxActiveClusters, 8)
NEW_HANDLE(cuModuleLoad) NEW_HANDLE(cuModuleLoadData) NEW_HANDLE(cuModuleLoadDataEx)
LAUNCHES_FIRST(cuLaunchKernel) LAUNCHES_FIRST(cuLaunchCooperativeKernel) LAUNCHES_SECOND(cuLaunchKernelEx)
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxPushCurrent_v2) NOTHING(cuCtxPopCurrent_v2)
NOTHING(cuCtxSetLimit) NOTHING(cuModuleUnload) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuLinkCreate_v2) NOTHING(cuLinkAddData_v2) NOTHING(cuLinkComplete)

NOTHING(unknown_driver_function)

// torch asks for the driver's functions by name. It calls those that are missing above only in features we do not use.
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, long flags, int *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = (void *)unknown_driver_function;
    if (result) *result = SUCCESS;
    return SUCCESS;
}

// ---- cuBLAS: a product is one launch

LAUNCHES(cublasGemmEx) LAUNCHES(cublasSgemm_v2) LAUNCHES(cublasSgemmEx) LAUNCHES(cublasDgemm_v2)
LAUNCHES(cublasGemmStridedBatchedEx) LAUNCHES(cublasSgemmStridedBatched) LAUNCHES(cublasDgemmStridedBatched)
LAUNCHES(cublasSgemv_v2) LAUNCHES(cublasSdot_v2) LAUNCHES(cublasDotEx) LAUNCHES(cublasLtMatmul)
NEW_HANDLE(cublasCreate_v2) NEW_HANDLE(cublasLtMatmulDescCreate) NEW_HANDLE(cublasLtMatmulPreferenceCreate)
NEW_HANDLE(cublasLtMatrixLayoutCreate)
STORES_SECOND(cublasGetMathMode, 0) STORES_SECOND(cublasGetPointerMode_v2, 0)
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetSmCountTarget)
NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)

size_t cublasLtGetVersion(void) { return CUBLASLT_VERSION; }

// Finds one algorithm that needs no workspace. Its description is 96 bytes of zeros.
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    return memset(results, 0, 96), *found = 1, SUCCESS;
}

// ---- cuSOLVER: eigenvectors and QR decompositions for SOAP, each one launch that needs no workspace

LAUNCHES(cusolverDnXsyevd) LAUNCHES(cusolverDnXsyevBatched) LAUNCHES(cusolverDnXgeqrf) LAUNCHES(cusolverDnSorgqr)
NEW_HANDLE(cusolverDnCreate) NEW_HANDLE(cusolverDnCreateParams)
NOTHING(cusolverDnDestroy) NOTHING(cusolverDnDestroyParams) NOTHING(cusolverDnSetStream)

int cusolverDnXsyevd_bufferSize(void *handle, void *params, int vectors, int part, long n, int type, void *matrix,
                                long stride, int value_type, void *values, int compute, size_t *device, size_t *host) {
    return *device = *host = 0, SUCCESS;
}

int cusolverDnXsyevBatched_bufferSize(void *handle, void *params, int vectors, int part, long n, int type, void *matrix,
                                      long stride, int value_type, void *values, int compute, size_t *device,
                                      size_t *host, long batch) {
    return *device = *host = 0, SUCCESS;
}

int cusolverDnXgeqrf_bufferSize(void *handle, void *params, long rows, long columns, int type, void *matrix,
                                long stride, int tau_type, void *tau, int compute, size_t *device, size_t *host) {
    return *device = *host = 0, SUCCESS;
}

int cusolverDnSorgqr_bufferSize(void *handle, int rows, int columns, int reflectors, void *matrix, int stride,
                                void *tau, int *size) {
    return *size = 0, SUCCESS;
}

// ---- NCCL: a collective is one launch, and no rank hears of another. Each finds its own values in place of theirs.

struct communicator {
    int size, rank;
};

static const size_t bytes_of_type[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // ncclDataType_t

struct unique_id {  // passed by value, so its size matters
    char bytes[128];
};

static int new_communicator(struct communicator **out, int size, int rank) {
    *out = malloc(sizeof **out);
    **out = (struct communicator){size, rank};
    return SUCCESS;
}

int ncclCommInitRankConfig(struct communicator **out, int size, struct unique_id id, int rank) {
    return new_communicator(out, size, rank);
}

int ncclCommInitRankScalable(struct communicator **out, int size, int rank) {
    return new_communicator(out, size, rank);
}

int ncclCommSplit(struct communicator *from, int color, int rank, struct communicator **out) {
    return new_communicator(out, from->size, rank);
}

int ncclCommCount(struct communicator *of, int *size) { return *size = of->size, SUCCESS; }
int ncclCommUserRank(struct communicator *of, int *rank) { return *rank = of->rank, SUCCESS; }
int ncclCommMemStats(struct communicator *of, int what, uint64_t *value) { return *value = 0, SUCCESS; }
const char *ncclGetErrorString(void) { return "error of the null GPU"; }
const char *ncclGetLastError(void) { return ""; }

int ncclAllReduce(const void *from, void *to, size_t count, int type) {
    copy(to, from, count * bytes_of_type[type]);
    return count_launch_of_library("ncclAllReduce");
}

int ncclAllGather(const void *from, char *to, size_t count, int type, struct communicator *ranks) {
    size_t size = count * bytes_of_type[type];
    for (int i = 0; i < ranks->size; i++) copy(to + i * size, from, size);
    return count_launch_of_library("ncclAllGather");
}

LAUNCHES(ncclBroadcast) LAUNCHES(ncclReduce) LAUNCHES(ncclReduceScatter) LAUNCHES(ncclSend) LAUNCHES(ncclRecv)
STORES(ncclGetVersion, NCCL_VERSION) STORES_SECOND(ncclCommGetAsyncError, 0)
NOTHING(ncclGetUniqueId) NOTHING(ncclCommDestroy) NOTHING(ncclCommAbort) NOTHING(ncclCommFinalize)
NOTHING(ncclCommRegister) NOTHING(ncclCommDeregister) NOTHING(ncclGroupStart) NOTHING(ncclGroupEnd)
NOTHING(ncclRedOpCreatePreMulSum) NOTHING(ncclRedOpDestroy)

// ---- what a test reads through ctypes

void null_gpu_reset(void) {
    for (int i = 0; i < BUCKETS; i++)
        for (struct kernel *kernel = kernels[i]; kernel; kernel = kernel->next) kernel->launches = 0;
    memcpy(peak, used, sizeof peak);
    host_waits = 0;
}

long null_gpu_host_waits(void) { return host_waits; }
size_t null_gpu_used(int device) { return used[device]; }
size_t null_gpu_peak(int device) { return peak[device]; }

// Write a line "launches name" for each kernel that was launched.
int null_gpu_write_launches(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return -1;
    for (int i = 0; i < BUCKETS; i++)
        for (struct kernel *kernel = kernels[i]; kernel; kernel = kernel->next)
            if (kernel->launches) fprintf(file, "%ld %s\n", kernel->launches, kernel->name);
    return fclose(file);
}
