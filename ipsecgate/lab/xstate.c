/* LD_PRELOAD for user-mode-linux on CPUs whose extended state is larger than it keeps (see xstate.py).
 *
 * User-mode-linux keeps 2,696 bytes of a task's XSAVE area. PTRACE_SETREGSET(NT_X86_XSTATE) takes the
 * whole area or fails with EFAULT, and on a CPU with AMX the area has 11,008 bytes. So on EFAULT, read
 * the task's whole area, copy the caller's bytes over its beginning, and write all of it.
 *
 * This includes no header, so that a compiler alone can build it (tcc comes without headers).
 * Source: Linux arch/x86/kernel/fpu/regset.c, xstateregs_set(); Intel SDM volume 1, 13.4 and 13.5.
 */

#define GETREGSET 0x4204
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

static long write_whole(call *next, int pid, const struct vector *given)
{
    static unsigned char area[1 << 16]; /* the kernel uses only as much as it needs */
    struct vector whole = {area, sizeof area};
    const unsigned char *from = given->base;
    unsigned long i;

    if (given->length < BITMAP + 8 || given->length > sizeof area) {
        *__errno_location() = EFAULT;
        return -1;
    }
    if (next(GETREGSET, pid, (void *)XSTATE, &whole) != 0)
        return -1;
    for (i = 0; i < given->length; i++)
        area[i] = from[i];
    /* The rest of the area belongs to another task by now: reset those components. */
    *(unsigned long *)(area + BITMAP) &= components_within(given->length);
    whole.length = sizeof area;
    return next(SETREGSET, pid, (void *)XSTATE, &whole);
}

long ptrace(int request, int pid, void *address, void *data)
{
    static call *next;
    long result;

    if (!next)
        next = (call *)dlsym((void *)-1L /* RTLD_NEXT */, "ptrace");
    result = next(request, pid, address, data);
    if (result == -1 && request == SETREGSET && address == (void *)XSTATE &&
        *__errno_location() == EFAULT)
        return write_whole(next, pid, data);
    return result;
}
