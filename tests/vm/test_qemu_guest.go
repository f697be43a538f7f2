// The guest of test_qemu.py: a first program that tells the console what it sees of its VM.
//
// It runs in place of /init (rdinit=), loads the modules that lie beside it, and then prints a
// line `tick N vda=SECTORS` a few times a second. On the kernel command line `test.fill=MB` has it
// write that much to the disk, read it back past the page cache, and say whether it is right;
// `test.shout=KB` has it print that much and end the machine.
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	disk  = "/dev/vda"
	clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
)

func main() {
	for _, kind := range []string{"proc", "sysfs", "devtmpfs"} {
		target := map[string]string{"proc": "/proc", "sysfs": "/sys", "devtmpfs": "/dev"}[kind]
		_ = os.MkdirAll(target, 0o755)
		_ = syscall.Mount(kind, target, kind, 0, "")
	}
	fmt.Printf("guest: init uptime=%s\n", strings.Fields(read("/proc/uptime"))[0])
	loadModules()
	fmt.Printf("guest: clocksource=%s\n", read(clock))
	fmt.Printf("guest: kernel-complaints=%d\n", complaints())
	fmt.Printf("guest: cpus=%d net=%s\n", strings.Count(read("/proc/cpuinfo"), "processor\t"), read("/sys/class/net/eth0/address"))
	if mb := parameter("test.fill"); mb > 0 {
		go fill(mb)
	}
	if kb := parameter("test.shout"); kb > 0 {
		shout(kb)
	}
	fmt.Println("guest: ready")
	for n := 0; ; n++ {
		fmt.Printf("tick %d vda=%s clock=%s\n", n, read("/sys/block/vda/size"), read(clock))
		time.Sleep(200 * time.Millisecond)
	}
}

func shout(kb int) {
	for n := range kb {
		fmt.Printf("%s %06d\n", strings.Repeat("a", 1024-9), n)
	}
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
}

func read(path string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return "none"
	}
	return strings.TrimSpace(string(content))
}

func parameter(name string) int {
	for _, word := range strings.Fields(read("/proc/cmdline")) {
		if value, ok := strings.CutPrefix(word, name+"="); ok {
			number, _ := strconv.Atoi(value)
			return number
		}
	}
	return 0
}

func loadModules() {
	for _, name := range strings.Fields(read("/modules/order")) {
		content, err := os.ReadFile("/modules/" + name)
		if err != nil || len(content) == 0 {
			continue
		}
		parameters, _ := syscall.BytePtrFromString("")
		_, _, errno := syscall.Syscall(syscall.SYS_INIT_MODULE, uintptr(unsafe.Pointer(&content[0])), uintptr(len(content)), uintptr(unsafe.Pointer(parameters)))
		if errno != 0 {
			fmt.Printf("guest: module %s: %v\n", name, errno)
		}
	}
}

// complaints counts the lines of the kernel log that find fault with the clock.
func complaints() int {
	log, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return -1
	}
	defer log.Close()
	found, line := 0, make([]byte, 8192)
	for {
		n, err := syscall.Read(int(log.Fd()), line)
		if err != nil {
			return found
		}
		for _, word := range []string{"unstable", "Unable to calibrate", "WARNING", "soft lockup"} {
			if bytes.Contains(line[:n], []byte(word)) {
				found++
			}
		}
	}
}

func pattern(block int) []byte {
	content := make([]byte, 1<<20)
	for i := 0; i < len(content); i += 8 {
		binary.LittleEndian.PutUint64(content[i:], uint64(block)<<32|uint64(i)|1<<63)
	}
	return content
}

func fill(mb int) {
	// Past the page cache, so that what is read back comes from the disk.
	file, err := os.OpenFile(disk, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		fmt.Printf("fill failed: %v\n", err)
		return
	}
	buffer := aligned()
	for i := range mb {
		copy(buffer, pattern(i))
		if _, err := file.WriteAt(buffer, int64(i)<<20); err != nil {
			fmt.Printf("fill failed at %d: %v\n", i, err)
			return
		}
	}
	fmt.Println("fill written")
	for i := range mb {
		if _, err := file.ReadAt(buffer, int64(i)<<20); err != nil || !bytes.Equal(buffer, pattern(i)) {
			fmt.Printf("fill wrong at %d: %v\n", i, err)
			return
		}
	}
	fmt.Println("fill verified")
}

// aligned is a buffer of 1 MiB that O_DIRECT accepts.
func aligned() []byte {
	memory, err := syscall.Mmap(-1, 0, 1<<20, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		panic(err)
	}
	return memory
}
