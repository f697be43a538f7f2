package process

import (
	"slices"
	"sync"

	processpb "sandmartin.dev/guest/internal/gen/process"
)

const (
	// A subscriber that reads slowly holds this many chunks; after that the process waits.
	queueLength = 8
	// What is kept of the output while nobody listens.
	replaySize = 1 << 20
	// Counted for each kept event beside its bytes: a process may write one byte at a time.
	eventOverhead = 256
)

// feed hands the events of one process to its subscribers. While there are none, output is kept,
// bounded; what the last subscriber did not take before it left counts as not listened to.
type feed struct {
	mu   sync.Mutex
	room sync.Cond // a subscriber took something, or left

	pid         int
	subscribers map[*subscriber]struct{}
	replay      []*processpb.ProcessEvent
	replayBytes int
	dropped     uint64
	ended       *processpb.ProcessEvent
}

// subscriber is one listener; its queue is guarded by the feed.
type subscriber struct {
	queue []*processpb.ProcessEvent
	// Taken, and not yet known to have been passed on.
	sending *processpb.ProcessEvent
	// It left while it was sending, and what it sent is kept until that is known to have arrived.
	kept bool
	// Has one element while the queue may have some.
	wake chan struct{}
}

func newFeed() *feed {
	f := &feed{subscribers: map[*subscriber]struct{}{}}
	f.room.L = &f.mu
	return f
}

// subscribe adds a listener that first gets the start, then what was kept, then what comes.
func (f *feed) subscribe() *subscriber {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &subscriber{wake: make(chan struct{}, 1)}
	s.push(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Start{
		Start: &processpb.ProcessEvent_StartEvent{Pid: uint32(f.pid), DroppedBytes: f.dropped},
	}})
	for _, event := range f.replay {
		s.push(event)
	}
	f.replay, f.replayBytes, f.dropped = nil, 0, 0
	if f.ended != nil {
		s.push(f.ended)
	}
	f.subscribers[s] = struct{}{}
	return s
}

// unsubscribe ends a listener. What it did not pass on is kept if it was the last one. Idempotent.
func (f *feed) unsubscribe(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, listening := f.subscribers[s]; !listening {
		return
	}
	delete(f.subscribers, s)
	f.room.Broadcast()
	if len(f.subscribers) > 0 {
		return
	}
	if s.sending != nil {
		f.keep(s.sending)
		s.kept = true
	}
	for _, event := range s.queue {
		f.keep(event)
	}
}

// publish hands output to every subscriber, waiting for slow ones, or keeps it.
func (f *feed) publish(event *processpb.ProcessEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.crowded() {
		f.room.Wait()
	}
	if len(f.subscribers) == 0 {
		f.keep(event)
	}
	for s := range f.subscribers {
		s.push(event)
	}
}

func (f *feed) crowded() bool {
	for s := range f.subscribers {
		if len(s.queue) >= queueLength {
			return true
		}
	}
	return false
}

// finish tells all that the process has ended; who subscribes later is told too.
func (f *feed) finish(end *processpb.ProcessEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = end
	for s := range f.subscribers {
		s.push(end)
	}
}

// take returns the next event for a subscriber, or nil; sent must follow.
func (f *feed) take(s *subscriber) *processpb.ProcessEvent {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(s.queue) == 0 {
		return nil
	}
	event := s.queue[0]
	s.queue, s.sending = s.queue[1:], event
	if len(s.queue) > 0 {
		s.wakeUp()
	}
	f.room.Broadcast()
	return event
}

// sent tells that what a subscriber took was passed on, be it that it has left since.
func (f *feed) sent(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	passed := s.sending
	s.sending = nil
	if !s.kept {
		return
	}
	if at := slices.Index(f.replay, passed); at >= 0 {
		f.replay = slices.Delete(f.replay, at, at+1)
		f.replayBytes -= outputSize(passed) + eventOverhead
	}
}

func (s *subscriber) push(event *processpb.ProcessEvent) {
	s.queue = append(s.queue, event)
	s.wakeUp()
}

func (s *subscriber) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// keep stores output for the next subscriber, at the cost of the oldest.
func (f *feed) keep(event *processpb.ProcessEvent) {
	f.dropped += event.GetStart().GetDroppedBytes()
	if event.GetData() == nil {
		return // the start and the end are made anew for each subscriber
	}
	f.replay = append(f.replay, event)
	f.replayBytes += outputSize(event) + eventOverhead
	for f.replayBytes > replaySize {
		oldest := outputSize(f.replay[0])
		f.replay = f.replay[1:]
		f.replayBytes -= oldest + eventOverhead
		f.dropped += uint64(oldest)
	}
}

func outputSize(event *processpb.ProcessEvent) int {
	data := event.GetData()
	return len(data.GetStdout()) + len(data.GetStderr()) + len(data.GetPty())
}
