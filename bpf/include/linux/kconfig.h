/* What BCC asks of the kernel's configuration. */
#define CONFIG_BPF_SYSCALL 1
