package process

import (
	"bytes"
	"testing"
	"time"

	processpb "sandmartin.dev/guest/internal/gen/process"
)

func output(data []byte) *processpb.ProcessEvent {
	return &processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: asStdout(data)}}
}

// drain takes what is queued, as a listener that passes everything on.
func drain(f *feed, s *subscriber) (dropped uint64, data []byte, ended bool) {
	for event := f.take(s); event != nil; event = f.take(s) {
		dropped += event.GetStart().GetDroppedBytes()
		data = append(data, event.GetData().GetStdout()...)
		ended = ended || event.GetEnd() != nil
		f.sent(s)
	}
	return dropped, data, ended
}

func TestReplayIsBounded(t *testing.T) {
	for name, chunk := range map[string]int{"single bytes": 1, "full chunks": chunkSize, "odd chunks": 777} {
		t.Run(name, func(t *testing.T) {
			f := newFeed()
			var written []byte
			for n := 0; len(written) < 3*replaySize && n < 20_000; n++ {
				data := bytes.Repeat([]byte{byte(n)}, chunk)
				written = append(written, data...)
				f.publish(output(data))
			}
			held := 0
			for _, event := range f.replay {
				held += outputSize(event) + eventOverhead
			}
			if held > replaySize || held != f.replayBytes {
				t.Errorf("%d bytes are held, %d are counted, %d are allowed", held, f.replayBytes, replaySize)
			}
			dropped, data, _ := drain(f, f.subscribe())
			if dropped == 0 || int(dropped)+len(data) != len(written) {
				t.Errorf("%d dropped and %d kept do not make %d", dropped, len(data), len(written))
			}
			if !bytes.Equal(data, written[dropped:]) {
				t.Error("what is kept is not the newest output in its order")
			}
			if dropped, data, _ := drain(f, f.subscribe()); dropped != 0 || len(data) != 0 {
				t.Error("a replay is told only once")
			}
		})
	}
}

func TestWhatALeavingListenerDidNotPassOnIsKept(t *testing.T) {
	f := newFeed()
	first := f.subscribe()
	for _, data := range []string{"a", "b", "c"} {
		f.publish(output([]byte(data)))
	}
	f.take(first) // the start
	f.sent(first)
	f.take(first) // a
	f.sent(first)
	f.take(first) // b, and the sending fails
	f.unsubscribe(first)
	f.unsubscribe(first)
	f.publish(output([]byte("d")))
	f.finish(endOf(0))
	if _, data, ended := drain(f, f.subscribe()); string(data) != "bcd" || !ended {
		t.Errorf("got %q, ended %v", data, ended)
	}
}

func TestWhatArrivedWhileItsListenerLeftIsNotToldAgain(t *testing.T) {
	f := newFeed()
	first := f.subscribe()
	f.publish(output([]byte("a")))
	f.publish(output([]byte("b")))
	f.take(first) // the start
	f.sent(first)
	f.take(first) // a
	f.unsubscribe(first)
	f.sent(first)
	if _, data, _ := drain(f, f.subscribe()); string(data) != "b" || f.replayBytes != 0 {
		t.Errorf("got %q, and %d bytes are counted", data, f.replayBytes)
	}
}

func endOf(code int32) *processpb.ProcessEvent {
	return &processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: &processpb.ProcessEvent_EndEvent{ExitCode: code, Exited: true}}}
}

func TestTheOtherListenersShareIsNotKept(t *testing.T) {
	f := newFeed()
	stays, leaves := f.subscribe(), f.subscribe()
	f.publish(output([]byte("x")))
	f.unsubscribe(leaves)
	if _, data, _ := drain(f, stays); string(data) != "x" {
		t.Errorf("got %q", data)
	}
	f.unsubscribe(stays)
	if _, data, _ := drain(f, f.subscribe()); len(data) != 0 {
		t.Errorf("%q was told twice", data)
	}
}

func TestASlowListenerHoldsBackUntilItLeaves(t *testing.T) {
	f := newFeed()
	slow := f.subscribe()
	const total = 10 * queueLength
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range total {
			f.publish(output([]byte("x")))
		}
	}()
	deadline := time.Now().Add(10 * time.Second)
	for queued := 0; queued < queueLength; time.Sleep(time.Millisecond) {
		f.mu.Lock()
		queued = len(slow.queue)
		f.mu.Unlock()
		if queued > queueLength || time.Now().After(deadline) {
			t.Fatalf("%d events are queued", queued)
		}
	}
	select {
	case <-done:
		t.Fatal("the publisher did not wait")
	default:
	}
	f.unsubscribe(slow)
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the publisher still waits for who has left")
	}
	if _, data, _ := drain(f, f.subscribe()); len(data) != total {
		t.Errorf("%d of %d events are left", len(data), total)
	}
}
