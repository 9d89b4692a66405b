/* Threads that do the parts of a call at the same time.

       int name(..., int64_t part, int64_t parts)                 one part, as it stands in another file
       int name_in_parts(..., int64_t parts, int64_t threads)     all of them, which is what compiled.py calls

   The second is written by build.py from the signature of the first. It puts its arguments into a struct, and gives
   in_parts below this struct and a function that calls the first with what is in it.

   The threads know nothing of Python, so they never wait for its lock. They are made when they are first wanted, and
   kept. One that has nothing to do looks for work for a while before it sleeps: in a net the calls follow each other
   more quickly than a sleeping thread wakes up (40 us). But when threads of Python are about to work, it is told to stop
   looking.

   How many parts of the call are open, and for how many threads, is one word, threads << 32 | open. Who takes a part
   exchanges the word for one with an open part less. In such an exchange only one can win, and the call cannot end
   before the winner has done its part. So what else belongs to the call is read after the exchange, and stays as it is
   until then. (A thread may have read the word in an earlier call: if it is the same in this one, so is what it says.)

   The library for float has threads of its own, and so has that for double. */

#include "pool.h"

#ifdef _WIN32

bool in_parts(Work *work, const void *call, int64_t parts, int64_t threads)
{
    (void)parts, (void)threads;
    return work(call, 0, 1);
}

void stop_looking(void) {}

#else

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#ifndef PATIENCE
#define PATIENCE 200000 /* nanoseconds before a thread sleeps */
#endif
#define LOOKS 16        /* before it looks at the clock */

static struct {
    pthread_mutex_t busy; /* held by whose call this is */
    Work *work;
    const void *call;
    int64_t parts;
    _Atomic int64_t left; /* threads << 32 | open */
    _Atomic int64_t done;
    atomic_bool failed;

    pthread_mutex_t sleep;
    pthread_cond_t begun, ended;
    atomic_int asleep; /* of the threads */
    atomic_bool caller_asleep, told_to_stop;
    int64_t made; /* threads */
} pool;

/* Also in the child of a fork, which has none of the threads. */
static void begin(void)
{
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.begun, NULL);
    pthread_cond_init(&pool.ended, NULL);
    pool.caller_asleep = pool.told_to_stop = false;
    pool.left = pool.made = 0;
    pool.asleep = 0;
}

static void begin_once(void)
{
    begin();
    pthread_atfork(NULL, NULL, begin);
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static inline void wait_a_little(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Is there an open part for thread number `me`? The caller is number 0. */
static inline bool is_open(int64_t left, int64_t me) { return (left & 0xffffffff) && me < left >> 32; }

static void take_parts(int64_t me)
{
    int64_t left = atomic_load(&pool.left);
    while (is_open(left, me)) {
        if (!atomic_compare_exchange_weak(&pool.left, &left, left - 1))
            continue;
        const int64_t parts = pool.parts;
        if (pool.work(pool.call, parts - (left & 0xffffffff), parts))
            pool.failed = true;
        if (atomic_fetch_add(&pool.done, 1) + 1 == parts && pool.caller_asleep) {
            pthread_mutex_lock(&pool.sleep);
            pthread_cond_signal(&pool.ended);
            pthread_mutex_unlock(&pool.sleep);
        }
        left = atomic_load(&pool.left);
    }
}

static bool has_ended(int64_t parts) { return pool.done == parts; }
static bool has_work(int64_t me) { return is_open(pool.left, me); }

/* Does it hold within the time of its patience? */
static bool comes(bool (*what)(int64_t), int64_t of)
{
    for (int64_t end = now() + PATIENCE; now() < end && !pool.told_to_stop;)
        for (int i = 0; i < LOOKS; i++, wait_a_little())
            if (what(of))
                return true;
    return false;
}

void stop_looking(void) { pool.told_to_stop = true; }

static void *life(void *number)
{
    for (const int64_t me = (intptr_t)number;; take_parts(me))
        if (!comes(has_work, me)) {
            pthread_mutex_lock(&pool.sleep);
            pool.asleep++;
            while (!has_work(me))
                pthread_cond_wait(&pool.begun, &pool.sleep);
            pool.asleep--;
            pthread_mutex_unlock(&pool.sleep);
        }
    return NULL;
}

/* Another thread, to which no signal goes but those of its own faults: the others are for Python. Fewer threads than
   wanted do the same work. */
static bool another(void)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV), sigdelset(&all, SIGBUS), sigdelset(&all, SIGFPE), sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool is_made = !pthread_create(&thread, NULL, life, (void *)(intptr_t)(pool.made + 1));
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (is_made) {
        pthread_detach(thread);
        pool.made++;
    }
    return is_made;
}

bool in_parts(Work *work, const void *call, int64_t parts, int64_t threads)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, begin_once);
    if (threads <= 1 || pthread_mutex_trylock(&pool.busy)) /* the threads are at work for another caller */
        return work(call, 0, 1);
    while (pool.made < threads - 1 && another())
        ;
    pool.work = work;
    pool.call = call;
    pool.parts = parts;
    pool.failed = pool.told_to_stop = false;
    pool.done = 0;
    pool.left = threads << 32 | parts; /* from here on they take parts */
    if (pool.asleep) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.begun);
        pthread_mutex_unlock(&pool.sleep);
    }
    take_parts(0);
    if (!comes(has_ended, parts)) {
        pthread_mutex_lock(&pool.sleep);
        pool.caller_asleep = true;
        while (!has_ended(parts))
            pthread_cond_wait(&pool.ended, &pool.sleep);
        pool.caller_asleep = false;
        pthread_mutex_unlock(&pool.sleep);
    }
    bool failed = pool.failed;
    pthread_mutex_unlock(&pool.busy);
    return failed;
}

#endif
