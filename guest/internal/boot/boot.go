// Package boot is the VM's first program: it brings up devices, the root disk and the network,
// starts the agent, and stays as a PID 1 that reaps.
//
// The root file system is used as it is: nothing of ours has to be installed in it. What we need
// there lives in a tmpfs on /run.
package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	newRoot      = "/newroot"
	ownDir       = "/run/sandmartin"
	ownBinary    = ownDir + "/guest"
	diskDeadline = 10 * time.Second
	maxRestart   = 5 * time.Second
)

var started = time.Now()

// Run does everything a PID 1 has to do and never returns.
func Run() {
	if os.Getenv("SANDMARTIN_STAGE") == "2" {
		supervise(parameters())
	}
	if err := first(); err != nil {
		say("boot failed: %v", err)
		powerOff(unix.LINUX_REBOOT_CMD_RESTART)
	}
	select {}
}

func say(format string, values ...any) {
	fmt.Printf("sandmartin: %6d ms "+format+"\n", append([]any{time.Since(started).Milliseconds()}, values...)...)
}

// first runs from the initramfs and ends by executing the second stage in the new root.
func first() error {
	if err := mountAll([]mount{{"proc", "/proc", "proc", 0, ""}, {"sysfs", "/sys", "sysfs", 0, ""}, {"devtmpfs", "/dev", "devtmpfs", 0, ""}}); err != nil {
		return err
	}
	given := parameters()
	if given["sandmartin.probe"] == "1" {
		fmt.Println("sandmartin-probe-ok")
		powerOff(unix.LINUX_REBOOT_CMD_RESTART)
	}
	loadModules()
	if err := mountRoot(given); err != nil {
		return err
	}
	if err := enterRoot(); err != nil {
		return err
	}
	return syscall.Exec(ownBinary, []string{"sandmartin-init"}, []string{"SANDMARTIN_STAGE=2"})
}

// parameters are the name=value words of the kernel command line.
func parameters() map[string]string {
	given := map[string]string{}
	line, _ := os.ReadFile("/proc/cmdline")
	for _, word := range strings.Fields(string(line)) {
		if name, value, ok := strings.Cut(word, "="); ok {
			given[name] = value
		}
	}
	return given
}

type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// loadModules loads what /modules/order lists; a failure matters only if the disk then stays away.
func loadModules() {
	order, err := os.Open("/modules/order")
	if err != nil {
		return
	}
	defer order.Close()
	for lines := bufio.NewScanner(order); lines.Scan(); {
		name := strings.TrimSpace(lines.Text())
		if name == "" {
			continue
		}
		if err := loadModule(filepath.Join("/modules", name)); err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			say("module %s: %v", name, err)
		}
	}
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FinitModule(int(file.Fd()), "", 0)
}

func mountRoot(given map[string]string) error {
	device, kind := given["sandmartin.root"], given["sandmartin.rootfstype"]
	if device == "" {
		device = "/dev/vda"
	}
	if kind == "" {
		kind = "ext4"
	}
	for deadline := time.Now().Add(diskDeadline); ; time.Sleep(2 * time.Millisecond) {
		if _, err := os.Stat(device); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the root disk %s did not appear within %v", device, diskDeadline)
		}
	}
	// A change of times alone is not worth a transaction of the file system's journal.
	return mountAll([]mount{{device, newRoot, kind, unix.MS_NOATIME | unix.MS_LAZYTIME, ""}})
}

// enterRoot fills the new root's API file systems, puts this binary there and moves into it.
func enterRoot() error {
	at := func(path string) string { return newRoot + path }
	err := mountAll([]mount{
		{"tmpfs", at("/run"), "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"proc", at("/proc"), "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", at("/sys"), "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", at("/dev"), "devtmpfs", unix.MS_NOSUID, ""},
		{"devpts", at("/dev/pts"), "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", at("/dev/shm"), "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", at("/sys/fs/cgroup"), "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	})
	if err != nil {
		return err
	}
	if err := os.Mkdir(at("/tmp"), 0o755); err == nil {
		// What an image brings is kept as it is; ours must not depend on the umask.
		if err := os.Chmod(at("/tmp"), 0o777|os.ModeSticky); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		_ = os.Symlink(target, at("/dev/"+name))
	}
	if err := os.MkdirAll(at(ownDir), 0o755); err != nil {
		return err
	}
	if err := copyFile("/init", at(ownBinary)); err != nil {
		return err
	}
	freeInitramfs()
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Close()
}

// freeInitramfs gives back the memory of the first root file system, which cannot be unmounted.
func freeInitramfs() {
	_ = os.RemoveAll("/modules")
	_ = os.Remove("/init")
}

// supervise is the second stage: network, then the agent for as long as the VM lives.
func supervise(given map[string]string) {
	// The agent and we must survive a guest that runs out of memory.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	_ = unix.Sethostname([]byte("sandbox"))
	if err := network(given["sandmartin.addr"], given["sandmartin.gateway"], given["sandmartin.gateway-mac"]); err != nil {
		say("network: %v", err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT, unix.SIGPWR)
	go func() {
		<-stop
		powerOff(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}()
	args := []string{"agent", "--vm", "--gateway", given["sandmartin.gateway"]}
	if address, _, ok := strings.Cut(given["sandmartin.addr"], "/"); ok {
		args = append(args, "--address", address)
	}
	first := append(args[:len(args):len(args)], "--rehearse")
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, maxRestart) {
		begun := time.Now()
		runAgent(first)
		// What runs already must not be told another name by an agent that starts anew.
		first = args
		if time.Since(begun) > time.Minute {
			pause = 10 * time.Millisecond
		}
		time.Sleep(pause)
	}
}

// runAgent starts the agent and reaps every child until the agent itself ends.
func runAgent(args []string) {
	agent := exec.Command(ownBinary, args...)
	agent.Stdout, agent.Stderr = os.Stdout, os.Stderr
	agent.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// Nothing in it runs for long without a call, and every signal to interrupt it costs thousands
	// of instructions that nothing else needs.
	agent.Env = []string{"GODEBUG=asyncpreemptoff=1", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if err := agent.Start(); err != nil {
		say("agent: %v", err)
		return
	}
	say("agent started")
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == agent.Process.Pid {
			say("agent ended: %v %v", status, err)
			return
		}
	}
}

func network(address, gateway, gatewayMAC string) error {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	if address == "" {
		return nil
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := netlink.AddrReplace(eth, addr); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return err
	}
	via, err := netlink.ParseIPNet(gateway + "/32")
	if err != nil {
		return err
	}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: via.IP}); err != nil {
		return err
	}
	if err := know(eth, via.IP, gatewayMAC); err != nil {
		return err
	}
	return resolver(gateway)
}

// know notes where the gateway is, so that it is never asked for: a VM that is restored would
// begin with that.
func know(link netlink.Link, ip net.IP, mac string) error {
	if mac == "" {
		return nil
	}
	address, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: ip, HardwareAddr: address, State: netlink.NUD_PERMANENT})
}

func resolver(gateway string) error {
	content := []byte("nameserver " + gateway + "\n")
	if current, err := os.ReadFile("/etc/resolv.conf"); err == nil && bytes.Equal(current, content) {
		return nil
	}
	_ = os.MkdirAll("/etc", 0o755)
	// It may be a link into a /run that is empty here.
	_ = os.Remove("/etc/resolv.conf")
	return os.WriteFile("/etc/resolv.conf", content, 0o644)
}

func powerOff(how int) {
	unix.Sync()
	_ = unix.Reboot(how)
	select {}
}
