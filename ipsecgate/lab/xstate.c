/* LD_PRELOAD for user-mode-linux on CPUs whose extended state is larger than it keeps (see xstate.py).
 *
 * User-mode-linux keeps 2,696 bytes of a task's XSAVE area. PTRACE_SETREGSET(NT_X86_XSTATE) takes the
 * whole area or fails with EFAULT, and on a CPU with AMX the area has 11,008 bytes. So after an EFAULT,
 * write a whole area that begins with the caller's bytes. User-mode-linux does this for every system
 * call of its tasks, so it must cost little: in a virtual machine a single CPUID takes microseconds.
 *
 * This includes no header, so that a compiler alone can build it (tcc comes without headers).
 * Source: Linux arch/x86/kernel/fpu/regset.c, xstateregs_set(); Intel SDM volume 1, 13.4 and 13.5.
 */

#define SETREGSET 0x4205
#define XSTATE 0x202 /* NT_X86_XSTATE */
#define EFAULT 14
#define BITMAP 512  /* offset of XSTATE_BV: which components the area holds; 8 bytes */
#define LEGACY 2    /* components 0 and 1 are in the area's first 512 bytes */
#define COMPONENTS 63

struct vector {
    void *base;
    unsigned long length;
};

typedef long call(int request, ...);

extern void *dlsym(void *handle, const char *name);
extern void *memcpy(void *to, const void *from, unsigned long length);
extern int *__errno_location(void);

/* Offset and size of component `number` in an uncompacted area; both are 0 if there is none. */
static void locate(unsigned number, unsigned *offset, unsigned *size)
{
    unsigned a, b, c, d;

    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(0xd), "2"(number));
    *offset = b;
    *size = a;
}

/* The components that lie entirely within an area's first `length` bytes, as bits of XSTATE_BV. */
unsigned long components_within(unsigned long length)
{
    unsigned long within = (1UL << LEGACY) - 1;
    unsigned number, offset, size;

    for (number = LEGACY; number < COMPONENTS; number++) {
        locate(number, &offset, &size);
        if (size && offset && offset + size <= length)
            within |= 1UL << number;
    }
    return within;
}

/* The kernel reads only the components that the bitmap names, so the rest of the area may hold anything. */
static long write_whole(call *next, int pid, const struct vector *given)
{
    static unsigned char area[1 << 16]; /* the kernel uses only as much as it needs */
    static unsigned long length, within;
    struct vector whole = {area, sizeof area};

    if (given->length < BITMAP + 8 || given->length > sizeof area) {
        *__errno_location() = EFAULT;
        return -1;
    }
    if (given->length != length) {
        length = given->length;
        within = components_within(length);
    }
    memcpy(area, given->base, length);
    *(unsigned long *)(area + BITMAP) &= within;
    return next(SETREGSET, pid, (void *)XSTATE, &whole);
}

long ptrace(int request, int pid, void *address, void *data)
{
    static call *next;
    static unsigned long refused; /* the length that failed last */
    const struct vector *given = data;
    int writes = request == SETREGSET && address == (void *)XSTATE;
    long result;

    if (!next)
        next = (call *)dlsym((void *)-1L /* RTLD_NEXT */, "ptrace");
    if (writes && refused && given->length == refused)
        return write_whole(next, pid, given);
    result = next(request, pid, address, data);
    if (writes && result == -1 && *__errno_location() == EFAULT) {
        refused = given->length;
        return write_whole(next, pid, given);
    }
    return result;
}
