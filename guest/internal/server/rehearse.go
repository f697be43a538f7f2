package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	processpb "sandmartin.dev/guest/internal/gen/process"
	"sandmartin.dev/guest/internal/gen/process/processconnect"
	"sandmartin.dev/guest/internal/identity"
)

const (
	rehearsed      = "/bin/true"
	rehearsalLimit = 2 * time.Second
	rehearsalToken = "rehearsal"
	threads        = 6
	threadNap      = 5 * time.Millisecond
)

// rehearse does once what the host will ask for first, before anybody may ask for anything.
//
// A VM is frozen after this and restored many times: what is read from the disk, allocated or
// worked out on first use is there then, and is not done again by every one of them. An understudy
// of this agent serves it, of which nothing is left. That an image has no such command, or that it
// does not end within the limit, changes nothing.
func (a *agent) rehearse(command string, limit time.Duration) error {
	a.processes.Prepare()
	startThreads()
	return errors.Join(a.identity.Rehearse(), rehearseCalls(command, limit))
}

func rehearseCalls(command string, limit time.Duration) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := newAgent(identity.New(true), "127.0.0.1", cgroupRoot).server(true)
	defer server.Close()
	go func() { _ = server.Serve(listener) }()
	ctx, cancel := context.WithTimeout(context.Background(), 2*limit)
	defer cancel()
	introduction := fmt.Sprintf(`{"accessToken":%q,"envVars":null,"moved":true}`, rehearsalToken)
	if err := call(ctx, listener.Addr(), "/init", "application/json", []byte(introduction), limit); err != nil {
		return err
	}
	return call(ctx, listener.Addr(), processconnect.ProcessStartProcedure, "application/connect+proto", startRequest(command), limit)
}

// startThreads leaves the runtime with threads at rest: each system call that lasts takes one.
func startThreads() {
	var group sync.WaitGroup
	for range threads {
		group.Go(func() {
			nap := unix.NsecToTimespec(threadNap.Nanoseconds())
			_ = unix.Nanosleep(&nap, nil)
		})
	}
	group.Wait()
}

func startRequest(command string) []byte {
	none := false
	message, _ := proto.Marshal(&processpb.StartRequest{Process: &processpb.ProcessConfig{Cmd: command}, Stdin: &none})
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

func call(ctx context.Context, address net.Addr, path, kind string, body []byte, limit time.Duration) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address.String()+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", kind)
	request.Header.Set("X-Access-Token", rehearsalToken)
	request.Header.Set("Connect-Timeout-Ms", strconv.FormatInt(limit.Milliseconds(), 10))
	request.SetBasicAuth("root", "")
	answer, err := http.DefaultTransport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(io.Discard, answer.Body)
	return err
}
