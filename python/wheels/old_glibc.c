/* What the modules of a wheel take from a glibc newer than the wheel asks for, out of older parts.
   Linked into the module and hidden there. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* glibc 2.32: nonzero lets libstdc++ count references without atomic instructions. */
HIDDEN char __libc_single_threaded = 0;

/* glibc 2.33; before it, programs brought functions of their own that called these. */
int __fxstat(int version, int descriptor, struct stat* status);
int __lxstat(int version, const char* path, struct stat* status);
int __xstat(int version, const char* path, struct stat* status);
int __fxstat64(int version, int descriptor, struct stat64* status);

#ifdef __x86_64__
enum { kStatVersion = 1 };
#else
enum { kStatVersion = 0 };
#endif

HIDDEN int fstat(int descriptor, struct stat* status) {
  return __fxstat(kStatVersion, descriptor, status);
}

HIDDEN int lstat(const char* path, struct stat* status) {
  return __lxstat(kStatVersion, path, status);
}

HIDDEN int stat(const char* path, struct stat* status) {
  return __xstat(kStatVersion, path, status);
}

HIDDEN int fstat64(int descriptor, struct stat64* status) {
  return __fxstat64(kStatVersion, descriptor, status);
}

/* glibc 2.36. std::random_device may call it. */
HIDDEN uint32_t arc4random(void) {
  uint32_t value;
  if (getentropy(&value, sizeof(value)) != 0) abort();
  return value;
}

/* glibc 2.30. Where it is missing, the deadline is carried over to the clock of timedwait. */
typedef int ClockWait(pthread_cond_t*, pthread_mutex_t*, clockid_t, const struct timespec*);

HIDDEN int pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex,
                                  clockid_t clock, const struct timespec* deadline) {
  ClockWait* const present = (ClockWait*)dlsym(RTLD_NEXT, "pthread_cond_clockwait");
  if (present != NULL) return present(condition, mutex, clock, deadline);
  const long second = 1000000000;
  struct timespec here, wall, until;
  clock_gettime(clock, &here);
  clock_gettime(CLOCK_REALTIME, &wall);
  until.tv_sec = wall.tv_sec + (deadline->tv_sec - here.tv_sec);
  until.tv_nsec = wall.tv_nsec + (deadline->tv_nsec - here.tv_nsec);
  if (until.tv_nsec < 0) {
    until.tv_nsec += second;
    --until.tv_sec;
  } else if (until.tv_nsec >= second) {
    until.tv_nsec -= second;
    ++until.tv_sec;
  }
  return pthread_cond_timedwait(condition, mutex, &until);
}
