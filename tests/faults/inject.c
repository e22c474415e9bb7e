/* LD_PRELOAD: the n-th operation that changes a file below FAULT_ROOT fails or is the last one.
 *
 * FAULT_STATE names a file that all processes map: how many such operations there were, at which
 * of them something happens (0: never), what, and with which errno; then a letter for each. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, KILL_HALFWAY, KILL_GROUP, TERMINATE, FAIL_ONCE, FAIL_FOR_GOOD };

static struct { long count, at, kind, error; char letters[4096]; } *state;
static const char *root;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULT_STATE");
    root = getenv("FAULT_ROOT");
    int file = path && root ? REAL(open)(path, O_RDWR) : -1;
    if (file < 0) return;
    void *map = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (map != MAP_FAILED) state = map;
}

static int below(const char *path) { return strncmp(path, root, strlen(root)) == 0; }

static int ours(const char *path) {
    char full[8192];
    if (!state) return 0;
    if (path[0] == '/') return below(path);
    if (!getcwd(full, 4096)) return 0;
    strcat(full, "/");
    strncat(full, path, 4000);
    return below(full);
}

static int ours_open(int file) {
    char name[64], path[4096];
    if (!state) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t n = readlink(name, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Count an operation; 1 where it is to fail. `frees`: a full disk lets it pass. */
static int fails(int frees, char letter) {
    long number = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
    if (number < (long)sizeof state->letters) state->letters[number] = letter;
    if (!state->at || number < state->at) return 0;
    int now = number == state->at;
    if (now && state->kind == KILL_GROUP) kill(0, SIGKILL);
    if (now && state->kind <= KILL_HALFWAY) kill(getpid(), SIGKILL);
    if (now && state->kind == TERMINATE) kill(getpid(), SIGTERM);
    if (state->kind < FAIL_ONCE || (state->kind == FAIL_ONCE && !now)) return 0;
    if (state->error == ENOSPC && frees) return 0;
    errno = (int)state->error;
    return 1;
}

ssize_t write(int file, const void *data, size_t size) {
    if (ours_open(file)) {
        int next = state->at && __atomic_load_n(&state->count, __ATOMIC_SEQ_CST) + 1 == state->at;
        if (next && state->kind == KILL_HALFWAY) REAL(write)(file, data, size / 2);
        if (next && state->kind == FAIL_FOR_GOOD && state->error == ENOSPC && size > 1) {
            __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
            return REAL(write)(file, data, size / 2); /* what still had room */
        }
        if (fails(0, 'w')) return -1;
    }
    return REAL(write)(file, data, size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return ours_open(file) && fails(0, 'w') ? -1 : REAL(pwrite)(file, data, size, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    return ours_open(file) && fails(0, 'w') ? -1 : REAL(writev)(file, parts, count);
}

int fsync(int file) { return ours_open(file) && fails(0, 's') ? -1 : REAL(fsync)(file); }

int ftruncate(int file, off_t size) {
    return ours_open(file) && fails(1, 't') ? -1 : REAL(ftruncate)(file, size);
}

int ftruncate64(int file, off64_t size) {
    return ours_open(file) && fails(1, 't') ? -1 : REAL(ftruncate64)(file, size);
}

int rename(const char *from, const char *to) {
    return ours(to) && fails(1, 'r') ? -1 : REAL(rename)(from, to);
}

int link(const char *from, const char *to) {
    return ours(to) && fails(0, 'l') ? -1 : REAL(link)(from, to);
}

int unlink(const char *path) { return ours(path) && fails(1, 'u') ? -1 : REAL(unlink)(path); }

int rmdir(const char *path) { return ours(path) && fails(1, 'd') ? -1 : REAL(rmdir)(path); }

int mkdir(const char *path, mode_t mode) {
    return ours(path) && fails(0, 'm') ? -1 : REAL(mkdir)(path, mode);
}

#define OPEN(name)                                                           \
    int name(const char *path, int flags, ...) {                             \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                        \
        if (flags & O_CREAT && ours(path) && fails(0, 'o')) return -1;            \
        return REAL(name)(path, flags, mode);                                \
    }

OPEN(open)
OPEN(open64)
