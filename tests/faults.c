/* Preloaded into a program: the n-th call that changes something under a folder kills it, or fails from there on.

   faults_arm(folder, n, number)   number 0: SIGKILL at call n. Else calls that need room fail with this errno from n on.
   faults_count()                  calls since then */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long at;
static int number;
static atomic_long count;

void faults_arm(const char *path, long n, int error) {
    count = 0;
    at = n;
    number = error;
    snprintf(folder, sizeof folder, "%s", path);
}

long faults_count(void) { return count; }

static int under(const char *path) { return *folder && !strncmp(path, folder, strlen(folder)); }

/* The path that a name means beside an open folder. */
static int under_at(int fd, const char *name) {
    char link[64], found[PATH_MAX];
    if (*name == '/' || fd == AT_FDCWD) return under(name);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, found, sizeof found - 1);
    return n > 0 && (found[n] = 0, under(found));
}

static int strike(int ours, int needs_room) {
    if (!ours || !at) return 0;
    long n = ++count;
    if (!number && n == at) kill(getpid(), SIGKILL), pause();
    if (number && needs_room && n >= at) return errno = number, 1;
    return 0;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define CALL(name, ours, room, types, ...) \
    int name types { REAL(name); return strike(ours, room) ? -1 : real(__VA_ARGS__); }
#define WRITE(name, types, ...) \
    ssize_t name types { REAL(name); return strike(under_at(fd, "."), 1) ? -1 : real(__VA_ARGS__); }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return strike(flags & O_CREAT && under(path), 1) ? -1 : real(path, flags, mode); }
#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        REAL(name); va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return strike(flags & O_CREAT && under_at(fd, path), 1) ? -1 : real(fd, path, flags, mode); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
WRITE(write, (int fd, const void *data, size_t n), fd, data, n)
WRITE(writev, (int fd, const struct iovec *data, int n), fd, data, n)
WRITE(pwrite, (int fd, const void *data, size_t n, off_t where), fd, data, n, where)
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t where), fd, data, n, where)
CALL(fsync, under_at(fd, "."), 1, (int fd), fd)
CALL(fdatasync, under_at(fd, "."), 1, (int fd), fd)
CALL(ftruncate, under_at(fd, "."), 1, (int fd, off_t n), fd, n)
CALL(mkdir, under(path), 1, (const char *path, mode_t mode), path, mode)
CALL(mkdirat, under_at(fd, path), 1, (int fd, const char *path, mode_t mode), fd, path, mode)
CALL(rename, under(to), 1, (const char *from, const char *to), from, to)
CALL(renameat, under_at(fd, to), 1, (int old, const char *from, int fd, const char *to), old, from, fd, to)
CALL(unlink, under(path), 0, (const char *path), path)
CALL(unlinkat, under_at(fd, path), 0, (int fd, const char *path, int flags), fd, path, flags)
CALL(rmdir, under(path), 0, (const char *path), path)
