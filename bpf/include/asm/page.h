/* BCC sizes a ring buffer in these. On a kernel with larger pages the loader rounds up. */
#define PAGE_SIZE 4096
