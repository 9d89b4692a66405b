/* What pool.c promises, tried with its threads asleep and awake, with several callers, and in the child of a fork. */

#include <stdatomic.h>
#include <stdint.h>
static _Atomic int64_t patience = 200000;
#define PATIENCE patience
#include "pool.c"
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 64
#define CHECK(what) ((what) ? (void)0 : (printf("line %d: %s\n", __LINE__, #what), fflush(stdout), _exit(1)))

typedef struct {
    int64_t parts, bad;
    int done[MOST]; /* plain numbers: if two threads did one part, or the caller went on too early, that is a race */
    pthread_t by[MOST];
    atomic_int begun;
    int together; /* so many parts wait for each other */
} Call;

static int work(const void *given, int64_t part, int64_t parts)
{
    Call *call = (Call *)given;
    if (parts == 1) /* the whole call, by one thread */
        for (int64_t other = 1; other < call->parts; other++)
            call->done[other]++, call->by[other] = pthread_self();
    else
        CHECK(parts == call->parts && part >= 0 && part < parts);
    call->done[part]++;
    call->by[part] = pthread_self();
    call->begun++;
    for (time_t end = time(NULL) + 20; part < call->together && call->begun < call->together;)
        CHECK(time(NULL) < end);
    return part == call->bad || (parts == 1 && call->bad >= 0 && call->bad < call->parts);
}

static Call made(int64_t parts, int64_t threads, int64_t bad, int together)
{
    Call call = {.parts = parts, .bad = bad, .together = together};
    CHECK(in_parts(work, &call, parts, threads) == (bad >= 0 && bad < parts));
    for (int64_t part = 0; part < parts; part++)
        CHECK(call.done[part] == 1);
    return call;
}

static int threads_of(const Call *call)
{
    int different = 0;
    for (int64_t part = 0; part < call->parts; part++) {
        int64_t same = 0;
        while (!pthread_equal(call->by[same], call->by[part]))
            same++;
        different += same == part;
    }
    return different;
}

static void *calls(void *seed)
{
    unsigned state = (unsigned)(intptr_t)seed;
    for (int i = 0; i < 2000; i++) {
        int64_t parts = 1 + rand_r(&state) % MOST, threads = 1 + rand_r(&state) % 4;
        made(parts, threads, rand_r(&state) % (2 * MOST), 0);
        if (rand_r(&state) % 100 == 0)
            usleep(1000); /* they fall asleep */
        if (rand_r(&state) % 50 == 0)
            stop_looking();
    }
    return NULL;
}

static void at_the_same_time(int threads)
{
    const Call call = made(2 * threads, threads, -1, threads);
    CHECK(threads_of(&call) == threads);
}

/* With no end to their patience they sleep only because they are told, and wake up for the next call. */
static void they_stop_looking(void)
{
    patience = INT64_MAX / 2;
    for (int i = 0; i < 20; i++) {
        at_the_same_time(4);
        CHECK(pool.asleep == 0 || i == 0); /* some may have fallen asleep before */
        stop_looking();
        for (time_t end = time(NULL) + 20; pool.asleep < 3;)
            CHECK(time(NULL) < end);
    }
    patience = 200000;
}

static void several_callers(void)
{
    pthread_t others[3];
    for (intptr_t i = 0; i < 3; i++)
        pthread_create(&others[i], NULL, calls, (void *)(i + 1));
    calls((void *)99);
    for (int i = 0; i < 3; i++)
        pthread_join(others[i], NULL);
}

static volatile sig_atomic_t signals;
static pthread_t signalled;
static void on_signal(int number) { signals += number == SIGUSR1, signalled = pthread_self(); }

/* The threads take none, so one that this thread blocks waits for it. */
static void signals_are_for_the_caller(void)
{
    sigset_t one;
    sigemptyset(&one), sigaddset(&one, SIGUSR1);
    signal(SIGUSR1, on_signal);
    pthread_sigmask(SIG_BLOCK, &one, NULL);
    at_the_same_time(4);
    kill(getpid(), SIGUSR1);
    usleep(20000);
    CHECK(signals == 0);
    pthread_sigmask(SIG_UNBLOCK, &one, NULL);
    CHECK(signals == 1 && pthread_equal(signalled, pthread_self()));
}

static void in_children(void)
{
    pthread_t other;
    pthread_create(&other, NULL, calls, (void *)7); /* so that some are forked in the middle of a call */
    for (int i = 0; i < 50; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(60);
            at_the_same_time(3);
            _exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        CHECK(status == 0);
        usleep(500);
    }
    pthread_join(other, NULL);
}

int main(int argc, char **argv)
{
    alarm(240);
    for (int threads = 1; threads <= 4; threads++)
        at_the_same_time(threads);
    for (int i = 0; i < 100; i++) { /* not more than are asked for, though more are there */
        const Call call = made(MOST, 2, -1, 0);
        CHECK(threads_of(&call) <= 2);
    }
    for (int i = 0; i < 20; i++) /* asleep, and woken */
        usleep(2000), at_the_same_time(4);
    they_stop_looking();
    several_callers();
    signals_are_for_the_caller();
    if (argc > 1 && !strcmp(argv[1], "fork"))
        in_children();
    puts("all is well");
    return 0;
}
