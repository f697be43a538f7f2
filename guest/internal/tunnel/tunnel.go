// Package tunnel leads the host to what listens on this machine's loopback alone.
//
// A request to switch to tcp becomes a connection to a port, dialled from inside. It is accepted
// from the gateway alone: whoever is inside needs no such way.
package tunnel

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"sandmartin.dev/guest/internal/files"
)

const (
	dialDeadline = 5 * time.Second
	switched     = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
)

var loopback = []string{"127.0.0.1", "::1"}

// Handler serves GET /tunnel?port=N for the gateway.
func Handler(gateway string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, err := net.SplitHostPort(r.RemoteAddr)
		if err != nil || from != gateway {
			files.Refuse(w, http.StatusForbidden, "control routes are for the host alone")
			return
		}
		port, err := strconv.ParseUint(r.URL.Query().Get("port"), 10, 16)
		if err != nil || port == 0 || !strings.EqualFold(r.Header.Get("Upgrade"), "tcp") {
			files.Refuse(w, http.StatusBadRequest, "ask for an upgrade to tcp, and a port")
			return
		}
		target, err := dial(strconv.FormatUint(port, 10))
		if err != nil {
			files.Refuse(w, http.StatusBadGateway, "nothing listens on the port")
			return
		}
		defer target.Close()
		serve(w, target)
	})
}

func dial(port string) (*net.TCPConn, error) {
	var failures []error
	for _, address := range loopback {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(address, port), dialDeadline)
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

// serve passes on what comes at either end, until both have ended or one breaks off.
func serve(w http.ResponseWriter, target *net.TCPConn) {
	hijacked, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		files.Refuse(w, http.StatusInternalServerError, "the connection cannot be taken over")
		return
	}
	defer hijacked.Close()
	host, ok := hijacked.(*net.TCPConn)
	if !ok {
		return
	}
	// What was set for reading the request must not end what follows it.
	_ = host.SetDeadline(time.Time{})
	if _, err := io.WriteString(host, switched); err != nil {
		return
	}
	if early, err := buffered.Reader.Peek(buffered.Reader.Buffered()); err != nil {
		return
	} else if _, err := target.Write(early); err != nil {
		return
	}
	ended := make(chan error, 2)
	go pass(target, host, ended)
	go pass(host, target, ended)
	if err := <-ended; err != nil {
		return
	}
	<-ended
}

func pass(to, from *net.TCPConn, ended chan<- error) {
	_, err := io.Copy(to, from)
	if err == nil {
		err = to.CloseWrite()
	}
	ended <- err
}
