/* Preloaded into ranks: writes each placement call a rank makes to RECORDER_FILE, then makes it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static void record(const char *call, long mode, const unsigned long *mask, size_t words) {
    const char *path = getenv("RECORDER_FILE");
    const char *rank = getenv("RANK");
    if (!path || !rank) return;
    char line[65536];
    int length = snprintf(line, sizeof line, "%s %s %ld", rank, call, mode);
    for (size_t word = 0; mask && word < words; word++)
        for (int bit = 0; bit < 64; bit++)
            if (mask[word] >> bit & 1) length += snprintf(line + length, sizeof line - length, " %zu", word * 64 + bit);
    line[length++] = '\n';
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (file < 0) return;
    if (write(file, line, length) < 0) abort();
    close(file);
}

int sched_setaffinity(pid_t pid, size_t size, const cpu_set_t *set) {
    int (*real)(pid_t, size_t, const cpu_set_t *) = dlsym(RTLD_NEXT, "sched_setaffinity");
    record("sched_setaffinity", 0, (const unsigned long *)set, size / sizeof(unsigned long));
    return real(pid, size, set);
}

long syscall(long number, ...) {
    long (*real)(long, ...) = dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, number);
    long a = va_arg(list, long), b = va_arg(list, long), c = va_arg(list, long);
    long d = va_arg(list, long), e = va_arg(list, long), f = va_arg(list, long);
    va_end(list);
    if (number == SYS_set_mempolicy)
        record("set_mempolicy", (int)a, (const unsigned long *)b, b ? (size_t)c / 64 : 0);
    return real(number, a, b, c, d, e, f);
}
