package filesystem

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/keepalive"
	"sandmartin.dev/guest/internal/users"
)

const (
	// Of all clients. The kernel lets root have 128 of what each stands on, and others want some.
	maxWatchers = 64
	// A watcher that nobody has asked for so long may be taken for a new one.
	abandoned = 10 * time.Minute
)

// watches are the watchers at work.
type watches struct {
	directories budget

	mu   sync.Mutex
	open map[*watcher]struct{}
	// Those that are asked for their events, by their ids.
	polled map[string]*watcher
}

// watchRequest is what both ways to watch are asked with.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

func (s *Service) watch(header http.Header, request watchRequest) (*watcher, error) {
	var started *watcher
	options := watchOptions{request.GetRecursive(), request.GetIncludeEntry(), request.GetAllowNetworkMounts()}
	err := s.at(header, []string{request.GetPath()}, func(user *users.User, paths []string) (err error) {
		started, err = newWatcher(user, paths[0], options, &s.watches.directories)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.watches.add(started); err != nil {
		started.close()
		return nil, err
	}
	go started.run()
	return started, nil
}

func (s *watches) add(w *watcher) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.open) >= maxWatchers && !s.dropAbandoned() {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%d directories are being watched; stop watching one", maxWatchers))
	}
	if s.open == nil {
		s.open, s.polled = map[*watcher]struct{}{}, map[string]*watcher{}
	}
	s.open[w] = struct{}{}
	return nil
}

// dropAbandoned ends the watcher that was asked longest ago, if that is long enough.
func (s *watches) dropAbandoned() bool {
	var oldest string
	for id, w := range s.polled {
		if oldest == "" || w.asked.Before(s.polled[oldest].asked) {
			oldest = id
		}
	}
	if oldest == "" || time.Since(s.polled[oldest].asked) < abandoned {
		return false
	}
	s.drop(oldest)
	return true
}

func (s *watches) drop(id string) {
	w := s.polled[id]
	delete(s.polled, id)
	delete(s.open, w)
	w.close()
}

func (s *watches) remove(w *watcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, w)
	w.close()
}

// WatchDir streams what happens in a directory until the client leaves or the directory is gone.
func (s *Service) WatchDir(ctx context.Context, r *connect.Request[filesystempb.WatchDirRequest], stream *connect.ServerStream[filesystempb.WatchDirResponse]) error {
	w, err := s.watch(r.Header(), r.Msg)
	if err != nil {
		return err
	}
	defer s.watches.remove(w)
	start := &filesystempb.WatchDirResponse_Start{Start: &filesystempb.WatchDirResponse_StartEvent{}}
	if err := stream.Send(&filesystempb.WatchDirResponse{Event: start}); err != nil {
		return err
	}
	quiet := keepalive.Interval(r.Header())
	ticker := time.NewTicker(quiet)
	defer ticker.Stop()
	alive := &filesystempb.WatchDirResponse_Keepalive{Keepalive: &filesystempb.WatchDirResponse_KeepAlive{}}
	for {
		select {
		case <-w.wake:
			events, over, failed := w.take()
			for _, event := range events {
				if err := stream.Send(&filesystempb.WatchDirResponse{Event: &filesystempb.WatchDirResponse_Filesystem{Filesystem: event}}); err != nil {
					return err
				}
			}
			if over {
				return failed
			}
			ticker.Reset(quiet)
		case <-ticker.C:
			if err := stream.Send(&filesystempb.WatchDirResponse{Event: alive}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// CreateWatcher begins to collect what happens in a directory, for a client that will ask.
func (s *Service) CreateWatcher(_ context.Context, r *connect.Request[filesystempb.CreateWatcherRequest]) (*connect.Response[filesystempb.CreateWatcherResponse], error) {
	w, err := s.watch(r.Header(), r.Msg)
	if err != nil {
		return nil, err
	}
	id := rand.Text()
	s.watches.mu.Lock()
	defer s.watches.mu.Unlock()
	w.asked = time.Now()
	s.watches.polled[id] = w
	return connect.NewResponse(&filesystempb.CreateWatcherResponse{WatcherId: id}), nil
}

// GetWatcherEvents returns what happened since it was asked last. That events were lost is told
// once those from before are taken.
func (s *Service) GetWatcherEvents(_ context.Context, r *connect.Request[filesystempb.GetWatcherEventsRequest]) (*connect.Response[filesystempb.GetWatcherEventsResponse], error) {
	w, err := s.watches.asked(r.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	// What has happened until now is to be among what is taken.
	w.drain()
	events, _, failed := w.take()
	if len(events) == 0 && failed != nil {
		return nil, failed
	}
	return connect.NewResponse(&filesystempb.GetWatcherEventsResponse{Events: events}), nil
}

func (s *watches) asked(id string) (*watcher, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w, ok := s.polled[id]
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such watcher"))
	}
	w.asked = time.Now()
	return w, nil
}

// RemoveWatcher ends a watcher.
func (s *Service) RemoveWatcher(_ context.Context, r *connect.Request[filesystempb.RemoveWatcherRequest]) (*connect.Response[filesystempb.RemoveWatcherResponse], error) {
	if _, err := s.watches.asked(r.Msg.GetWatcherId()); err != nil {
		return nil, err
	}
	s.watches.mu.Lock()
	defer s.watches.mu.Unlock()
	if _, still := s.watches.polled[r.Msg.GetWatcherId()]; still {
		s.watches.drop(r.Msg.GetWatcherId())
	}
	return connect.NewResponse(&filesystempb.RemoveWatcherResponse{}), nil
}
