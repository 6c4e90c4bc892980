/*
 * Mends two errors of QEMU's VMRUN, in its memory: preloaded by boot.py.
 *
 * The first (QEMU 10.0 to 11.1, and older): when VMRUN injects an interrupt, helper_vmrun sets the CPU's exception_index to its vector and
 * delivers it there and then, but leaves the index set. If the CPU's loop is asked to stop before
 * anything clears it, as it is whenever a timer is due where instructions are counted, the loop
 * takes the index for an exception yet to be raised. The guest gets the interrupt again, though it
 * has interrupts off by then: it is interrupted while it holds a spin lock, and spins for ever.
 *
 * The delivery is the last thing that helper_vmrun does, and VMRUN ends its block of code, so that
 * the function that delivers may go back to the loop with the index cleared instead of returning.
 *
 * The second (QEMU 10.0, and older): helper_vmrun notes a virtual interrupt in the CPU's
 * interrupt_request by a plain "or" in memory, without QEMU's lock and not atomically. When a timer's
 * thread notes an interrupt at that very moment, that one is lost. If it was the one-shot timer of
 * the machine's only CPU, no other follows: the machine stands still, or its guest runs on for ever,
 * as nothing takes the CPU from it. The instruction is replaced by one that locks the bus.
 *
 * QEMU exports all that is needed for that. A QEMU that does not is left as it is, and says so.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct CPU CPU;

static CPU *(*qemu_get_cpu)(int index);
static void (*do_interrupt_all)(CPU *cpu, int vector, int is_int, int error_code,
                                uint64_t next_eip, int is_hw);
static void (*cpu_loop_exit_noexc)(CPU *cpu);
static uintptr_t vmrun, vmrun_end;

/* In place of do_interrupt_x86_hardirq. The registers, `env`, lie behind the CPU they belong to. */
static void deliver(uintptr_t env, int vector, int is_hw)
{
    uintptr_t caller = (uintptr_t)__builtin_return_address(0);
    CPU *owner = NULL, *cpu;

    for (int index = 0; (cpu = qemu_get_cpu(index)) != NULL; index++) {
        if ((uintptr_t)cpu < env && cpu > owner) {
            owner = cpu;
        }
    }
    do_interrupt_all(owner, vector, 0, 0, 0, is_hw);
    if (caller >= vmrun && caller < vmrun_end) {
        cpu_loop_exit_noexc(owner);
    }
}

/* Writes into the program. */
static int write_code(void *to, const void *from, size_t bytes)
{
    uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t page = (uintptr_t)to & ~(page_bytes - 1);
    size_t span = (uintptr_t)to + bytes - page;

    if (mprotect((void *)page, span, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
        return -1;
    }
    memcpy(to, from, bytes);
    return mprotect((void *)page, span, PROT_READ | PROT_EXEC);
}

/* movabs $TARGET, %rax; jmp *%rax */
static int redirect(uintptr_t function, uintptr_t target)
{
    uint8_t code[12] = {0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};

    memcpy(code + 2, &target, sizeof(target));
    return write_code((void *)function, code, sizeof(code));
}

/* A page that a jump of 32 bits reaches from there. */
static uint8_t *page_near(uintptr_t place)
{
    const uintptr_t step = 1 << 20, reach = 1 << 30;
    uintptr_t start = place & ~(step - 1);

    for (uintptr_t away = step; away < reach && away < start; away += step) {
        void *page = mmap((void *)(start - away), 64, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (page == (void *)(start - away)) {
            return page;
        }
        if (page != MAP_FAILED) {
            munmap(page, 64);
        }
    }
    return NULL;
}

/* jmp TO, for a place at FROM */
static void jump(uint8_t code[5], const uint8_t *from, const uint8_t *to)
{
    int32_t distance = (int32_t)(to - (from + 5));

    code[0] = 0xe9;
    memcpy(code + 1, &distance, sizeof(distance));
}

/* orl $CPU_INTERRUPT_VIRQ, interrupt_request: 81 /1, with a displacement of 32 bits from a register */
static const uint8_t or_opcode = 0x81, or_modrm = 0x88, or_value[4] = {0x00, 0x01, 0x00, 0x00};
enum { OR_BYTES = 10 };

/* Makes the one such instruction of helper_vmrun atomic. */
static int lock_request(void)
{
    uint8_t *found = NULL, *detour, code[OR_BYTES];

    for (uint8_t *at = (uint8_t *)vmrun; at + OR_BYTES <= (uint8_t *)vmrun_end; at++) {
        if (at[0] == or_opcode && (at[1] & 0xf8) == or_modrm && at[1] != (or_modrm | 4) &&
            memcmp(at + 6, or_value, sizeof(or_value)) == 0) {
            if (found) {
                return -1;
            }
            found = at;
        }
    }
    if (!found || !(detour = page_near((uintptr_t)found))) {
        return -1;
    }
    detour[0] = 0xf0; /* lock */
    memcpy(detour + 1, found, OR_BYTES);
    jump(detour + 1 + OR_BYTES, detour + 1 + OR_BYTES, found + OR_BYTES);
    if (mprotect(detour, 64, PROT_READ | PROT_EXEC) != 0) {
        return -1;
    }
    memset(code, 0x90, sizeof(code)); /* nop */
    jump(code, found, detour);
    return write_code(found, code, sizeof(code));
}

__attribute__((constructor)) static void mend(void)
{
    void *deliverer = dlsym(RTLD_DEFAULT, "do_interrupt_x86_hardirq");
    void *vmrun_start = dlsym(RTLD_DEFAULT, "helper_vmrun");
    const ElfW(Sym) *symbol = NULL;
    Dl_info info;

    *(void **)&qemu_get_cpu = dlsym(RTLD_DEFAULT, "qemu_get_cpu");
    *(void **)&do_interrupt_all = dlsym(RTLD_DEFAULT, "do_interrupt_all");
    *(void **)&cpu_loop_exit_noexc = dlsym(RTLD_DEFAULT, "cpu_loop_exit_noexc");
    if (!deliverer || !vmrun_start || !qemu_get_cpu || !do_interrupt_all || !cpu_loop_exit_noexc ||
        !dladdr1(vmrun_start, &info, (void **)&symbol, RTLD_DL_SYMENT) || !symbol) {
        fprintf(stderr, "testbed: this QEMU has other functions: its errors in VMRUN stay\n");
        return;
    }
    vmrun = (uintptr_t)vmrun_start;
    vmrun_end = vmrun + symbol->st_size;
    if (redirect((uintptr_t)deliverer, (uintptr_t)deliver) != 0) {
        perror("testbed: QEMU's first error in VMRUN stays");
    }
    if (lock_request() != 0) {
        fprintf(stderr, "testbed: this QEMU has another VMRUN: its second error may stay\n");
    }
}
