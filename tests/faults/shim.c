/* Lets file operations under a path fail, crawl or hang, in a process that preloads this library.

VDTRAIN_FAULTS holds rules, separated by ";":

    OPERATION PATH [errno=N] [rate=BYTES_PER_SECOND] [delay=MILLISECONDS] [hang] [kill] [after=N] [times=N] [rank=N]
    [seconds=S] [short]

OPERATION is open, read, write, sync, stat, list, rename, unlink, mkdir or rmdir, or any: each that changes something.
PATH is a part of the file's path. The rule holds for `times` calls (0: all) that come after the first `after` ones, in
the process of that rank (-1: all), and for `seconds` from the first of these on (0: without end). A read that is
`short` gives half of what is asked for; a process that is killed in a write has written half. A rule that befalls a
process says so once on its standard error. `read_faults` reads the rules anew, in a fork.
*/
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define RULES 16
struct rule {
    char operation[16], path[PATH_MAX];
    int number, hang, kill, rank, half;
    double rate, delay, seconds, began;
    long after, times, seen;
};
static struct rule rules[RULES];
static int count = -1;

void read_faults(void) { count = -1; }

static void parse(void) {
    char text[16384], *rest = text, *part;
    const char *given = getenv("VDTRAIN_FAULTS"), *rank = getenv("RANK");
    count = 0;
    if (!given) return;
    snprintf(text, sizeof text, "%s", given);
    while ((part = strsep(&rest, ";")) && count < RULES) {
        struct rule *rule = &rules[count];
        char *word;
        memset(rule, 0, sizeof *rule);
        rule->rank = -1;
        for (int place = 0; (word = strsep(&part, " "));) {
            if (!*word) continue;
            if (place == 0) snprintf(rule->operation, sizeof rule->operation, "%s", word);
            else if (place == 1) snprintf(rule->path, sizeof rule->path, "%s", word);
            else if (sscanf(word, "errno=%d", &rule->number) || sscanf(word, "rate=%lf", &rule->rate) ||
                     sscanf(word, "delay=%lf", &rule->delay) || sscanf(word, "after=%ld", &rule->after) ||
                     sscanf(word, "times=%ld", &rule->times) || sscanf(word, "rank=%d", &rule->rank) ||
                     sscanf(word, "seconds=%lf", &rule->seconds)) {
            } else if (!strcmp(word, "hang")) rule->hang = 1;
            else if (!strcmp(word, "kill")) rule->kill = 1;
            else if (!strcmp(word, "short")) rule->half = 1;
            place++;
        }
        if (*rule->path && (rule->rank < 0 || (rank && atoi(rank) == rule->rank))) count++;
    }
}

static void wait_for(double seconds) {
    struct timespec pause = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    while (nanosleep(&pause, &pause) && errno == EINTR) {}
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

#define OPEN_TO_READ "open to read"
static int changes(const char *operation) {
    return strcmp(operation, "read") && strcmp(operation, "stat") && strcmp(operation, "list") &&
           strcmp(operation, OPEN_TO_READ);
}
static int fits(const char *wanted, const char *operation) {
    return strcmp(wanted, "any") ? !strncmp(operation, wanted, strlen(wanted)) : changes(operation);
}

/* 0, or -1 with errno set; 1 for a short read, or a write amid which the process is to be killed. */
static int befall(const char *operation, const char *path, size_t bytes) {
    int half = 0;
    if (count < 0) parse();
    for (int index = 0; index < count; index++) {
        struct rule *rule = &rules[index];
        if (!fits(rule->operation, operation) || !path || !strstr(path, rule->path)) continue;
        long call = __sync_fetch_and_add(&rule->seen, 1) - rule->after;
        if (call < 0 || (rule->times && call >= rule->times)) continue;
        if (rule->seconds > 0) {
            if (!rule->began) rule->began = now();
            if (now() > rule->began + rule->seconds) continue;
        }
        if (call == 0) dprintf(2, "fault: %s %s\n", operation, path);
        if (rule->hang) wait_for(3600);
        if (rule->delay > 0) wait_for(rule->delay / 1000);
        if (rule->rate > 0) wait_for(bytes / rule->rate);
        if (rule->kill && strcmp(operation, "write")) raise(SIGKILL);
        if (rule->kill) return 1;
        if (rule->number) {
            errno = rule->number;
            return -1;
        }
        if (rule->half) half = 1;
    }
    return half;
}

/* Of a path that is relative to an open folder. */
static int befall_at(const char *operation, int folder, const char *name) {
    char link[64], path[PATH_MAX];
    if (count == 0 || !name) return 0;
    if (folder == AT_FDCWD || *name == '/') return befall(operation, name, 0);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return befall(operation, path, 0);
}

static int befall_file(const char *operation, int file, size_t bytes) {
    char link[64], path[PATH_MAX];
    if (count == 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return befall(operation, path, bytes);
}

#define NEXT(type, name) static type (*next)(); if (!next) next = (type(*)())dlsym(RTLD_NEXT, name)
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        mode_t mode = 0; \
        va_list list; \
        va_start(list, flags); \
        if (flags & (O_CREAT | O_TMPFILE)) mode = va_arg(list, mode_t); \
        va_end(list); \
        NEXT(int, #name); \
        const char *operation = flags & (O_CREAT | O_WRONLY | O_RDWR) ? "open" : OPEN_TO_READ; \
        return befall(operation, path, 0) ? -1 : next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define READ(name, extra, given) \
    ssize_t name(int file, void *buffer, size_t size extra) { \
        NEXT(ssize_t, #name); \
        int fate = befall_file("read", file, size); \
        return fate < 0 ? -1 : next(file, buffer, fate ? (size + 1) / 2 : size given); \
    }
#define COMMA ,
#define OFFSET , off_t offset
READ(read, , )
READ(pread, OFFSET, COMMA offset)
READ(pread64, OFFSET, COMMA offset)
#define READ_PARTS(name, extra, given) \
    ssize_t name(int file, const struct iovec *parts, int count, off_t offset extra) { \
        size_t size = 0; \
        for (int part = 0; part < count; part++) size += parts[part].iov_len; \
        NEXT(ssize_t, #name); \
        int fate = befall_file("read", file, size); \
        struct iovec half = parts[0]; \
        half.iov_len = (half.iov_len + 1) / 2; \
        if (fate < 0) return -1; \
        return fate ? next(file, &half, 1, offset given) : next(file, parts, count, offset given); \
    }
#define FLAGS , int flags
READ_PARTS(preadv, , )
READ_PARTS(preadv64, , )
READ_PARTS(preadv2, FLAGS, COMMA flags)
READ_PARTS(preadv64v2, FLAGS, COMMA flags)
ssize_t write(int file, const void *buffer, size_t size) {
    NEXT(ssize_t, "write");
    int fate = befall_file("write", file, size);
    if (fate > 0) {
        next(file, buffer, size / 2);
        raise(SIGKILL);
    }
    return fate ? -1 : next(file, buffer, size);
}
#define SYNC(name) \
    int name(int file) { \
        NEXT(int, #name); \
        return befall_file("sync", file, 0) ? -1 : next(file); \
    }
SYNC(fsync)
SYNC(fdatasync)
#define STAT(name, type) \
    int name(const char *path, struct type *found) { \
        NEXT(int, #name); \
        return befall("stat", path, 0) ? -1 : next(path, found); \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
DIR *opendir(const char *path) {
    NEXT(DIR *, "opendir");
    return befall("list", path, 0) ? NULL : next(path);
}
int rename(const char *path, const char *other) {
    NEXT(int, "rename");
    return befall("rename", path, 0) ? -1 : next(path, other);
}
int unlink(const char *path) {
    NEXT(int, "unlink");
    return befall("unlink", path, 0) ? -1 : next(path);
}
int unlinkat(int folder, const char *path, int flags) {
    NEXT(int, "unlinkat");
    return befall_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path) ? -1 : next(folder, path, flags);
}
int rmdir(const char *path) {
    NEXT(int, "rmdir");
    return befall("rmdir", path, 0) ? -1 : next(path);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(int, "mkdir");
    return befall("mkdir", path, 0) ? -1 : next(path, mode);
}
