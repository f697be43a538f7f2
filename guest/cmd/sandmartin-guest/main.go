// Command sandmartin-guest is both ends of a VM's user space: started as /init of the initramfs it
// brings the VM up and becomes its reaping PID 1; started as `agent` it serves the guest protocol.
package main

import (
	"fmt"
	"os"

	"sandmartin.dev/guest/internal/boot"
	"sandmartin.dev/guest/internal/server"
)

func main() {
	if os.Getpid() == 1 {
		boot.Run()
	}
	if len(os.Args) < 2 || os.Args[1] != "agent" {
		fmt.Fprintln(os.Stderr, "usage: sandmartin-guest agent [--listen ADDRESS:PORT]")
		os.Exit(2)
	}
	if err := server.Main(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "sandmartin: agent:", err)
		os.Exit(1)
	}
}
