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
// much of it is discarded at the end.

// slowReader takes n octets of conn at a time, with a pause after each.
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
		{"nothing after the first octet", 1, time.Hour, 64, limit + 2*time.Second},
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

func TestReadDeadlineThatWasPostponedHoldsAsItWasSetLast(t *testing.T) {
	for _, tt := range []struct {
		why  string
		set  []time.Duration // read deadlines, one after the other; 0 means none
		ends time.Duration   // 0: with the octet that arrives after an hour
	}{
		{"later", []time.Duration{5 * time.Minute, 10 * time.Minute}, 10 * time.Minute},
		{"later, and earlier again", []time.Duration{5 * time.Minute, 10 * time.Minute, 5*time.Minute + time.Second}, 5*time.Minute + time.Second},
		{"earlier", []time.Duration{10 * time.Minute, 5 * time.Minute}, 5 * time.Minute},
		{"none any more", []time.Duration{5 * time.Minute, 0}, 0},
		{"none at first", []time.Duration{0, 5 * time.Minute}, 5 * time.Minute},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				defer ours.Close()
				defer theirs.Close()
				time.AfterFunc(time.Hour, func() { _, _ = theirs.Write([]byte{'2'}) })
				c := newProgressConn(ours, 0, 0)
				began := time.Now()
				for _, d := range tt.set {
					var at time.Time
					if d > 0 {
						at = began.Add(d)
					}
					if err := c.SetReadDeadline(at); err != nil {
						t.Fatal(err)
					}
				}
				_, err := c.Read(make([]byte, 1))
				if took := time.Since(began); tt.ends == 0 && (err != nil || took != time.Hour) {
					t.Errorf("%v after %v, want the octet that arrives after an hour", err, took)
				} else if tt.ends > 0 && (!errors.Is(err, os.ErrDeadlineExceeded) || took != tt.ends) {
					t.Errorf("%v after %v, want a timeout after %v", err, took, tt.ends)
				}
			})
		})
	}
}

func TestReadEndsAtOnceOnAConnectionThatIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer ours.Close()
		defer theirs.Close()
		c := newProgressConn(ours, 0, 0)
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		began := time.Now()
		time.AfterFunc(time.Second, func() {
			c.abandon()
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
		})
		for range 2 {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error(err)
			}
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("it ended after %v, want 1 s", took)
		}
	})
}

// tunnel is a connection through something else, whose timeouts are errors of its own. limit is how long one of its own making
// takes; 0 means that it makes none.
type tunnel struct {
	net.Conn
	limit time.Duration
}

type tunnelTimeout struct{}

func (tunnelTimeout) Error() string { return "the tunnel timed out" }
func (tunnelTimeout) Timeout() bool { return true }

func (c *tunnel) Read(p []byte) (int, error) {
	if c.limit > 0 {
		time.Sleep(c.limit)
		return 0, tunnelTimeout{}
	}
	n, err := c.Conn.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = tunnelTimeout{}
	}
	return n, err
}

func TestReadDeadlineHoldsWhateverErrorAConnectionHasForTimeouts(t *testing.T) {
	for _, tt := range []struct {
		why         string
		limit, ends time.Duration
	}{
		{"a deadline that was postponed", 0, 10 * time.Minute},
		{"a timeout before any deadline", time.Second, time.Second},
		{"a deadline that comes a little early", 5*time.Minute - time.Millisecond, 10*time.Minute - 2*time.Millisecond},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				defer ours.Close()
				defer theirs.Close()
				c := newProgressConn(&tunnel{ours, tt.limit}, 0, 0)
				began := time.Now()
				_ = c.SetReadDeadline(began.Add(5 * time.Minute))
				_ = c.SetReadDeadline(began.Add(10 * time.Minute))
				_, err := c.Read(make([]byte, 1))
				if took := time.Since(began); !errors.Is(err, tunnelTimeout{}) || took != tt.ends {
					t.Errorf("%v after %v, want the tunnel's timeout after %v", err, took, tt.ends)
				}
			})
		})
	}
}
