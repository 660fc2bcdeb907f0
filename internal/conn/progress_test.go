package conn

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// These tests are about what the connection below TLS bounds by itself: how slow a relay may take what is written, and how
// much of it is thrown away at the end.

// slowReader takes n octets of conn at a time, with a pause behind each.
func slowReader(conn net.Conn, n int, pause time.Duration) {
	buf := make([]byte, n)
	for {
		if _, err := io.ReadFull(conn, buf); err != nil {
			return
		}
		time.Sleep(pause)
	}
}

func TestSlowRelayIsWrittenToAsLongAsItKeepsTheLeastRate(t *testing.T) {
	const limit = time.Minute
	for _, tt := range []struct {
		why    string
		octets int // that the relay takes at a time
		pause  time.Duration
		writes int // of 400 octets
		ends   time.Duration
	}{
		{"twice the least rate, with pauses of almost the limit", 2 * leastRate * 59, 59 * time.Second, 64, 0},
		{"just the least rate", leastRate, time.Second, 64, 0},
		{"half the least rate: it gives back half of the time that it takes", leastRate / 2, time.Second, 64, 2*limit + 2*time.Second},
		{"one octet a second", 1, time.Second, 64, limit*leastRate/(leastRate-1) + 2*time.Second},
		{"nothing behind the first octet", 1, time.Hour, 64, limit + 2*time.Second},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				defer ours.Close()
				var reader sync.WaitGroup
				defer reader.Wait()
				defer theirs.Close()
				reader.Go(func() { slowReader(theirs, tt.octets, tt.pause) })
				c := &progressConn{Conn: ours, limit: limit}
				began := time.Now()
				var err error
				for i := 0; i < tt.writes && err == nil; i++ {
					_, err = c.Write(make([]byte, 400))
				}
				took := time.Since(began)
				if tt.ends == 0 {
					if err != nil {
						t.Errorf("after %v: %v, want all of it written", took, err)
					}
				} else if !errors.Is(err, os.ErrDeadlineExceeded) || took < limit || took > tt.ends {
					t.Errorf("after %v: %v, want a time-out after %v to %v", took, err, limit, tt.ends)
				}
			})
		})
	}
}

// flood is a connection that never runs dry. It counts what is read.
type flood struct {
	net.Conn
	read int
}

func (f *flood) Read(p []byte) (int, error)       { f.read += len(p); return len(p), nil }
func (f *flood) CloseWrite() error                { return nil }
func (f *flood) Close() error                     { return nil }
func (f *flood) SetReadDeadline(time.Time) error  { return nil }
func (f *flood) SetWriteDeadline(time.Time) error { return nil }

func TestFloodIsNotReadToTheEndWhenWeHangUp(t *testing.T) {
	f := &flood{}
	(&progressConn{Conn: f}).hangUp(time.Hour)
	if f.read < maxDiscard || f.read > 2*maxDiscard {
		t.Errorf("%d octets were read, want about %d", f.read, maxDiscard)
	}
}
