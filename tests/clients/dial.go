// dial HOST:PORT: request / over HTTP and print the answer. Built without cgo, it is static and makes
// its own system calls: there is no C library to preload into.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	connection, err := net.Dial("tcp", os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Fprintf(connection, "GET / HTTP/1.0\r\n\r\n")
	if _, err := io.Copy(os.Stdout, connection); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
