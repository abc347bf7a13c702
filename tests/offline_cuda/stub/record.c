// What happened, as rows in the order of their happening; and what a test makes fail.
#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DEFAULT_MEMORY_MIB = 81559, FAULTS = 8 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Row *rows;
static long count, room;
static size_t limit = (size_t)DEFAULT_MEMORY_MIB << 20;
static struct {
    char what[16];
    int times;
} faults[FAULTS];

void add_row(Row row, const Stream *stream) {
    Stream *asked = (Stream *)stream;
    Capture *capture = asked ? capture_of(asked) : NULL;
    row.device = current_device;
    row.stream = asked ? asked->id : -1;
    row.thread = (int)syscall(SYS_gettid);
    if (capture) row.capture = capture->id;
    pthread_mutex_lock(&lock);
    if (count == room) {
        room = room ? 2 * room : 4096;
        rows = realloc(rows, room * sizeof(Row));
    }
    rows[count++] = row;
    pthread_mutex_unlock(&lock);
}

void complain(const char *format, const char *name, const Stream *stream) {
    char *text = malloc(512);
    snprintf(text, 512, format, name);
    add_row((Row){.kind = "COMPLAINT", .name = text}, stream);
}

size_t memory_limit(void) { return limit; }

// Does this call fail, because a test asked for it?
bool fails_now(const char *what) {
    bool fails = false;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < FAULTS; i++) {
        if (faults[i].times > 0 && !strcmp(faults[i].what, what)) {
            faults[i].times--;
            fails = true;
        }
    }
    pthread_mutex_unlock(&lock);
    return fails;
}

// ---- what ../recorder.py calls

void offline_reset(void) {
    pthread_mutex_lock(&lock);
    count = 0;
    pthread_mutex_unlock(&lock);
}

long offline_count(void) { return count; }

void offline_row(long index, Row *out) {
    pthread_mutex_lock(&lock);
    if (index < count) *out = rows[index];
    pthread_mutex_unlock(&lock);
}

size_t offline_row_bytes(void) { return sizeof(Row); }

void offline_limit_memory(size_t bytes) { limit = bytes ? bytes : (size_t)DEFAULT_MEMORY_MIB << 20; }

// Let the next calls of a kind fail; 0 times takes it back. Returns false where there are too many kinds.
bool offline_fail_next(const char *what, int times) {
    bool known = false;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < FAULTS && !known; i++) {
        if (!faults[i].what[0] || !strcmp(faults[i].what, what)) {
            snprintf(faults[i].what, sizeof faults[i].what, "%s", what);
            faults[i].times = times;
            known = true;
        }
    }
    pthread_mutex_unlock(&lock);
    return known;
}
