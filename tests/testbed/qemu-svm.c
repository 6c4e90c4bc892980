/*
 * Mends one error of QEMU (10.0 to 11.1, and older), in its memory: preloaded by boot.py.
 *
 * When VMRUN injects an interrupt, helper_vmrun sets the CPU's exception_index to its vector and
 * delivers it there and then, but leaves the index set. If the CPU's loop is asked to stop before
 * anything clears it, as it is whenever a timer is due where instructions are counted, the loop
 * takes the index for an exception yet to be raised. The guest gets the interrupt again, though it
 * has interrupts off by then: it is interrupted while it holds a spin lock, and spins for ever.
 *
 * The delivery is the last thing that helper_vmrun does, and VMRUN ends its block of code, so that
 * the function that delivers may go back to the loop with the index cleared instead of returning.
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

/* movabs $TARGET, %rax; jmp *%rax */
static int redirect(uintptr_t function, uintptr_t target)
{
    unsigned char jump[12] = {0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};
    uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t page = function & ~(page_bytes - 1);
    size_t bytes = function + sizeof(jump) - page;

    memcpy(jump + 2, &target, sizeof(target));
    if (mprotect((void *)page, bytes, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
        return -1;
    }
    memcpy((void *)function, jump, sizeof(jump));
    return mprotect((void *)page, bytes, PROT_READ | PROT_EXEC);
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
        fprintf(stderr, "testbed: this QEMU has other functions: its error in VMRUN stays\n");
        return;
    }
    vmrun = (uintptr_t)vmrun_start;
    vmrun_end = vmrun + symbol->st_size;
    if (redirect((uintptr_t)deliverer, (uintptr_t)deliver) != 0) {
        perror("testbed: QEMU's error in VMRUN stays");
    }
}
