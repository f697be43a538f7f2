package tunnel

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// echo serves on one loopback address, sending back what it gets and a farewell at the end of it.
func echo(t *testing.T, address string) int {
	t.Helper()
	listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
				_, _ = io.WriteString(conn, "farewell")
			}()
		}
	}()
	return listener.Addr().(*net.TCPAddr).Port
}

func ask(t *testing.T, gateway, query, upgrade, early string) (*bufio.Reader, net.Conn, *http.Response) {
	t.Helper()
	server := httptest.NewServer(Handler(gateway))
	t.Cleanup(server.Close)
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = fmt.Fprintf(conn, "GET /tunnel?%s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n%s", query, upgrade, early)
	reader := bufio.NewReader(conn)
	answer, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	return reader, conn, answer
}

func TestWhatComesAtOneEndLeavesAtTheOther(t *testing.T) {
	for _, address := range loopback {
		query := fmt.Sprintf("port=%d", echo(t, address))
		reader, conn, answer := ask(t, "127.0.0.1", query, "TCP", "early ")
		if answer.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%s: %s", address, answer.Status)
		}
		_, _ = io.WriteString(conn, strings.Repeat("x", 1<<20))
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(reader)
		if err != nil || string(content) != "early "+strings.Repeat("x", 1<<20)+"farewell" {
			t.Errorf("%s: %d bytes, %v", address, len(content), err)
		}
	}
}

func TestWhoAndWhatIsRefused(t *testing.T) {
	open := fmt.Sprintf("port=%d", echo(t, "127.0.0.1"))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := fmt.Sprintf("port=%d", listener.Addr().(*net.TCPAddr).Port)
	_ = listener.Close()
	for _, each := range []struct {
		gateway, query, upgrade string
		status                  int
	}{
		{"169.254.0.22", open, "tcp", http.StatusForbidden},
		{"127.0.0.1", open, "websocket", http.StatusBadRequest},
		{"127.0.0.1", "port=0", "tcp", http.StatusBadRequest},
		{"127.0.0.1", "port=65536", "tcp", http.StatusBadRequest},
		{"127.0.0.1", "port=x", "tcp", http.StatusBadRequest},
		{"127.0.0.1", "", "tcp", http.StatusBadRequest},
		{"127.0.0.1", closed, "tcp", http.StatusBadGateway},
	} {
		if _, _, answer := ask(t, each.gateway, each.query, each.upgrade, ""); answer.StatusCode != each.status {
			t.Errorf("%v: %s", each, answer.Status)
		}
	}
}
