// Package keepalive tells how long a stream may be quiet before it has to say that it is there.
package keepalive

import (
	"net/http"
	"strconv"
	"time"
)

const (
	standard   = 90 * time.Second
	maxSeconds = 3600
)

// Interval is what the client asks for in Keepalive-Ping-Interval, in seconds, or the standard.
func Interval(header http.Header) time.Duration {
	seconds, err := strconv.Atoi(header.Get("Keepalive-Ping-Interval"))
	if err != nil || seconds <= 0 || seconds > maxSeconds {
		return standard
	}
	return time.Duration(seconds) * time.Second
}
