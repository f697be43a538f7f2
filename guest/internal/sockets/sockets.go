// Package sockets ends connections that cannot go on: those of a VM that was copied or set back,
// whose peers outside it know nothing of that.
//
// Only what has a peer outside this machine is ended. Listeners, and whatever both ends of which
// are here, stay as they are.
package sockets

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

const (
	sockDiagByFamily = 20 // linux/sock_diag.h
	sockDestroy      = 21
	// Sizes of inet_diag_req_v2 and of the part of inet_diag_msg that is read, linux/inet_diag.h.
	requestSize = 56
	replySize   = 52
	// Room for what the kernel sends at once, netlink(7).
	bufferSize = 32 << 10
	maxRounds  = 4

	established = 1 // net/tcp_states.h; a connected UDP socket is in this state too
	finWait1    = 4
	finWait2    = 5
	closeWait   = 8
	lastAck     = 9
	closing     = 11
	// A connection that is still being made may yet be answered, and one that waits for its end
	// has none to be told of it.
	connected = 1<<established | 1<<finWait1 | 1<<finWait2 | 1<<closeWait | 1<<lastAck | 1<<closing
)

// Connection is one connection as its local end sees it.
type Connection struct{ Local, Remote netip.AddrPort }

// DestroyOutside ends all connections to the outside but one, and tells how many there were.
// What the kernel cannot end is left; errors.Is(err, errors.ErrUnsupported) says so.
func DestroyOutside(keep Connection) (int, error) {
	own, err := ownAddresses()
	if err != nil {
		return 0, err
	}
	kernel, err := dial()
	if err != nil {
		return 0, err
	}
	defer kernel.close()
	chosen := func(c Connection) bool { return c != keep && outside(c, own) }
	destroyed := 0
	// The kernel's list may leave some out that stand beside one that ends while it is read.
	for range maxRounds {
		n, err := kernel.destroyRound(chosen)
		destroyed += n
		if n == 0 || err != nil {
			return destroyed, err
		}
	}
	return destroyed, nil
}

func (d *diag) destroyRound(chosen func(Connection) bool) (int, error) {
	destroyed := 0
	var unsupported error
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			n, err := d.destroyAll(family, protocol, chosen)
			destroyed += n
			if errors.Is(err, errors.ErrUnsupported) {
				unsupported = err
			} else if err != nil {
				return destroyed, err
			}
		}
	}
	return destroyed, unsupported
}

// outside tells whether the other end of a connection is on another machine.
func outside(c Connection, own map[netip.Addr]bool) bool {
	remote := c.Remote.Addr()
	return !remote.IsUnspecified() && !remote.IsLoopback() && !own[remote]
}

// ownAddresses are those of this machine: what connects to one of them never leaves it.
func ownAddresses() (map[netip.Addr]bool, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("own addresses: %w", err)
	}
	own := map[netip.Addr]bool{}
	for _, address := range addresses {
		if prefix, ok := address.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(prefix.IP); ok {
				own[ip.Unmap()] = true
			}
		}
	}
	return own, nil
}

// diag is a socket to the kernel's socket diagnosis, sock_diag(7).
type diag struct {
	fd       int
	sequence uint32
	buffer   []byte
}

func dial() (*diag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, failed("open", err)
	}
	// The kernel answers at once; it is never waited for without end.
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	return &diag{fd: fd, buffer: make([]byte, bufferSize)}, nil
}

func (d *diag) close() { _ = unix.Close(d.fd) }

// failed names a step, and calls what a kernel without the ability answers by one name.
func failed(step string, err error) error {
	for _, missing := range []error{unix.ENOENT, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT} {
		if errors.Is(err, missing) {
			return fmt.Errorf("sock_diag: %s: %w", step, errors.ErrUnsupported)
		}
	}
	return fmt.Errorf("sock_diag: %s: %w", step, os.NewSyscallError("netlink", err))
}

// destroyAll ends the connections of one kind that are chosen.
func (d *diag) destroyAll(family, protocol uint8, chosen func(Connection) bool) (int, error) {
	var ids [][]byte
	request := make([]byte, requestSize)
	request[0], request[1] = family, protocol
	binary.NativeEndian.PutUint32(request[4:], connected)
	err := d.ask(sockDiagByFamily, unix.NLM_F_DUMP, request, func(reply []byte) {
		if c, ok := parse(reply); ok && chosen(c) {
			ids = append(ids, append([]byte(nil), reply[4:replySize]...))
		}
	})
	if err != nil {
		return 0, failed("list", err)
	}
	destroyed := 0
	for _, id := range ids {
		// The id ends with the socket's cookie, so no later connection can be meant by it.
		copy(request[8:], id)
		err := d.ask(sockDestroy, unix.NLM_F_ACK, request, nil)
		switch {
		case err == nil:
			destroyed++
		case errors.Is(err, unix.ENOENT): // it ended by itself
		default:
			return destroyed, failed("destroy", err)
		}
	}
	return destroyed, nil
}

// ask sends a request and reads until its answer is complete.
func (d *diag) ask(kind uint16, flags uint16, request []byte, each func(reply []byte)) error {
	d.sequence++
	message := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(request))
	binary.NativeEndian.PutUint32(message, uint32(cap(message)))
	binary.NativeEndian.PutUint16(message[4:], kind)
	binary.NativeEndian.PutUint16(message[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(message[8:], d.sequence)
	if err := unix.Sendto(d.fd, append(message, request...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if done, err := d.read(d.buffer[:n], each); done || err != nil {
			return err
		}
	}
}

// read takes one datagram apart; done is set by the end of an answer.
func (d *diag) read(datagram []byte, each func(reply []byte)) (done bool, err error) {
	for len(datagram) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(datagram))
		if size < unix.SizeofNlMsghdr || size > len(datagram) {
			return true, unix.EBADMSG
		}
		body := datagram[unix.SizeofNlMsghdr:size]
		if binary.NativeEndian.Uint32(datagram[8:]) == d.sequence {
			switch binary.NativeEndian.Uint16(datagram[4:]) {
			case unix.NLMSG_DONE:
				return true, nil
			case unix.NLMSG_ERROR:
				if len(body) < 4 {
					return true, unix.EBADMSG
				}
				if code := int32(binary.NativeEndian.Uint32(body)); code != 0 {
					return true, unix.Errno(-code)
				}
				return true, nil
			case sockDiagByFamily:
				each(body)
			}
		}
		datagram = datagram[min(len(datagram), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
	}
	return false, nil
}

// parse reads the addresses of an inet_diag_msg; mapped ones count as what they map.
func parse(reply []byte) (Connection, bool) {
	if len(reply) < replySize {
		return Connection{}, false
	}
	at := func(ip []byte) netip.Addr {
		if reply[0] == unix.AF_INET {
			return netip.AddrFrom4([4]byte(ip[:4]))
		}
		return netip.AddrFrom16([16]byte(ip)).Unmap()
	}
	return Connection{
		Local:  netip.AddrPortFrom(at(reply[8:24]), binary.BigEndian.Uint16(reply[4:])),
		Remote: netip.AddrPortFrom(at(reply[24:40]), binary.BigEndian.Uint16(reply[6:])),
	}, true
}
