package sockets

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	here     = "198.51.100.1"
	there    = "198.51.100.2"
	patience = 10 * time.Second
)

// twoPlaces puts this thread into a network of its own with a link to another one, and returns a
// function that runs something over there.
func twoPlaces(t *testing.T) (over func(func())) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	// The thread is not given back: it ends with the test's goroutine, and both networks with it.
	runtime.LockOSThread()
	other := must(netns.New())(t)
	own := must(netns.New())(t)
	t.Cleanup(func() { _ = errors.Join(other.Close(), own.Close()) })
	attributes := netlink.NewLinkAttrs()
	attributes.Name = "here"
	pair := &netlink.Veth{LinkAttrs: attributes, PeerName: "there", PeerNamespace: netlink.NsFd(other)}
	check(t, netlink.LinkAdd(pair))
	up(t, "lo")
	up(t, "here", here)
	over = func(do func()) {
		check(t, netns.Set(other))
		defer func() { check(t, netns.Set(own)) }()
		do()
	}
	over(func() { up(t, "there", there) })
	return over
}

func up(t *testing.T, name string, addresses ...string) {
	t.Helper()
	link := must(netlink.LinkByName(name))(t)
	for _, address := range addresses {
		check(t, netlink.AddrAdd(link, must(netlink.ParseAddr(address+"/24"))(t)))
	}
	check(t, netlink.LinkSetUp(link))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		check(t, err)
		return value
	}
}

func listen(t *testing.T, address string) net.Listener {
	t.Helper()
	listener := must(net.Listen("tcp", address))(t)
	t.Cleanup(func() { _ = listener.Close() })
	return listener
}

// connect returns both ends of a connection.
func connect(t *testing.T, listener net.Listener, network string) (near, far net.Conn) {
	t.Helper()
	near = must(net.Dial(network, listener.Addr().String()))(t)
	far = must(listener.Accept())(t)
	t.Cleanup(func() { _ = errors.Join(near.Close(), far.Close()) })
	return near, far
}

// alive tells whether a byte still gets from one end to the other.
func alive(t *testing.T, near, far net.Conn) bool {
	t.Helper()
	check(t, far.SetReadDeadline(time.Now().Add(patience)))
	if _, err := near.Write([]byte{'x'}); err != nil {
		return false
	}
	_, err := far.Read(make([]byte, 1))
	return err == nil
}

func connectionOf(conn net.Conn) Connection {
	return Connection{netip.MustParseAddrPort(conn.LocalAddr().String()), netip.MustParseAddrPort(conn.RemoteAddr().String())}
}

func TestOnlyConnectionsToTheOutsideAreDestroyed(t *testing.T) {
	over := twoPlaces(t)
	var outside net.Listener
	var echo *net.UDPConn
	over(func() {
		outside = listen(t, there+":0")
		echo = must(net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(there)}))(t)
	})
	defer echo.Close()
	within, named := listen(t, "127.0.0.1:0"), listen(t, here+":0")
	loopNear, loopFar := connect(t, within, "tcp")
	ownNear, ownFar := connect(t, named, "tcp")
	lostNear, _ := connect(t, outside, "tcp")
	keptNear, keptFar := connect(t, outside, "tcp")
	var comingNear, comingFar net.Conn
	over(func() { comingFar = must(net.Dial("tcp", named.Addr().String()))(t) })
	comingNear = must(named.Accept())(t)
	defer comingNear.Close()
	defer comingFar.Close()
	datagrams := must(net.Dial("udp", echo.LocalAddr().String()))(t)
	defer datagrams.Close()
	mapped := dialMapped(t, outside)

	destroyed, err := DestroyOutside(connectionOf(keptNear))
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("this kernel cannot: %v", err)
	}
	check(t, err)
	if destroyed != 4 {
		t.Errorf("%d connections were destroyed, not 4", destroyed)
	}
	for name, ends := range map[string][2]net.Conn{
		"on loopback": {loopNear, loopFar}, "to an own address": {ownNear, ownFar}, "that is kept": {keptNear, keptFar},
	} {
		if !alive(t, ends[0], ends[1]) || !alive(t, ends[1], ends[0]) {
			t.Errorf("the connection %s is dead", name)
		}
	}
	for name, conn := range map[string]net.Conn{"outgoing": lostNear, "incoming": comingNear, "UDP": datagrams, "mapped": mapped} {
		check(t, conn.SetReadDeadline(time.Now().Add(patience)))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("%s: %v", name, err)
		}
	}
	again, far := connect(t, outside, "tcp")
	if !alive(t, again, far) {
		t.Error("no new connection can be made")
	}
	again, far = connect(t, within, "tcp")
	if !alive(t, again, far) {
		t.Error("the listener is gone")
	}
	if destroyed, err = DestroyOutside(connectionOf(keptNear)); destroyed != 1 || err != nil {
		t.Errorf("%d destroyed, not the new one alone: %v", destroyed, err)
	}
}

// dialMapped connects by an IPv6 socket to an IPv4 address, as many programs do.
func dialMapped(t *testing.T, listener net.Listener) net.Conn {
	t.Helper()
	fd := must(unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))(t)
	to := netip.MustParseAddrPort(listener.Addr().String())
	check(t, unix.Connect(fd, &unix.SockaddrInet6{Addr: netip.AddrFrom16(to.Addr().As16()).As16(), Port: int(to.Port())}))
	file := os.NewFile(uintptr(fd), "mapped")
	defer file.Close()
	conn, far := must(net.FileConn(file))(t), must(listener.Accept())(t)
	t.Cleanup(func() { _ = errors.Join(conn.Close(), far.Close()) })
	return conn
}

func TestWhatIsOutside(t *testing.T) {
	own := map[netip.Addr]bool{netip.MustParseAddr("169.254.0.21"): true}
	for remote, expected := range map[string]bool{
		"203.0.113.7:80": true, "169.254.0.22:5": true, "[2001:db8::1]:80": true,
		"127.0.0.1:80": false, "127.3.2.1:80": false, "[::1]:80": false, "0.0.0.0:0": false, "[::]:0": false,
		"169.254.0.21:80": false,
	} {
		if c := (Connection{Remote: netip.MustParseAddrPort(remote)}); outside(c, own) != expected {
			t.Errorf("%s", remote)
		}
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	d := &diag{sequence: 1}
	for name, datagram := range map[string][]byte{
		"longer than it is":   {200, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0},
		"shorter than itself": {3, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0},
		"an error without":    {16, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0},
	} {
		if done, err := d.read(datagram, nil); !done || err == nil {
			t.Errorf("%s: %v, %v", name, done, err)
		}
	}
	if _, ok := parse(make([]byte, replySize-1)); ok {
		t.Error("half a reply was taken")
	}
}
