// Bodies in chunks (BDAT): refused chunks, and the end after the last one.
package test

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
)

func TestFirstRefusalOfAChunkIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refused bool
		c := bubbleClient(t, smtprelay.Config{Dial: relaytest.Dial(1<<20, func(_ int, l string) string {
			if strings.HasPrefix(l, "BDAT") && l != "BDAT 8" {
				if refused {
					return "503 5.5.1 bad sequence"
				}
				refused = true
				return "452 4.3.1 insufficient storage"
			}
			return relaytest.Agree("250-PIPELINING\n250-SIZE 10000000\n250 CHUNKING", l)
		})})
		m := shortMessage("b@y.example")
		m.Body = smtprelay.Bytes(bytes.Repeat([]byte("hello world, this\r\n"), 12000))
		_, err := c.Send(t.Context(), m)
		e := err.(*smtprelay.Error)
		if e.Reply.Code != 452 {
			t.Errorf("code %d, want 452; temporary=%v", e.Reply.Code, e.Temporary())
		}
		c.Close()
	})
}

func TestSilenceAfterALastChunkIsNotCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var bd atomic.Int64
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Dial: relaytest.Dial(0, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") {
				if bd.Add(1) == 1 {
					time.Sleep(100 * time.Millisecond)
				}
			}
			if l == "RSET" && bd.Load() == 1 {
				time.Sleep(6 * time.Second)
			}
			return relaytest.Agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})})
		errs := make(chan error, 4)
		for range 4 {
			go func() { _, err := c.Send(t.Context(), shortMessage("b@y.example")); errs <- err }()
		}
		for range 4 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		c.Close()
	})
}

func TestLastChunkIsNotSentOnceAChunkWasRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Dial: relaytest.Dial(0, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") && !strings.HasSuffix(l, "LAST") {
				return "452 4.3.1 no room for this chunk"
			}
			return relaytest.Agree("250-PIPELINING\n250-SIZE 10000000\n250 CHUNKING", l)
		})})
		m := shortMessage("b@y.example")
		m.Body = slowChunks{}
		_, err := c.Send(t.Context(), m)
		if err == nil {
			t.Error("a truncated message with a refused chunk is reported as accepted")
		}
		c.Close()
	})
}

type slowChunks struct{}

func (slowChunks) WriteTo(w io.Writer) (total int64, err error) {
	for range 3 {
		n, err := w.Write(bytes.Repeat([]byte("0123456789abcdef0123456789abcd\r\n"), 900))
		total += int64(n)
		if err != nil {
			return total, err
		}
		time.Sleep(time.Second)
	}
	return total, nil
}

// addressless is a connection without a remote address.
type addressless struct{ net.Conn }

func (addressless) RemoteAddr() net.Addr { return nil }

// What one relay has shown is not valid for another, so a connection that may lead to any relay gets no chunks.
func TestBodyIsSentByDataIfTheRelayHasNoAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, inChunks)
		cfg := configOf(relay)
		dial := cfg.Dial
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dial(ctx, network, addr)
			return addressless{conn}, err
		}
		client := newClient(t, cfg)
		if _, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes([]byte("Subject: x\r\n"))}); err != nil {
			t.Fatal(err)
		}
		if got := relay.Conns()[0].Commands; got["BDAT"] != 0 || got["DATA"] != 1 {
			t.Errorf("got %d BDAT and %d DATA, want 0 and 1", got["BDAT"], got["DATA"])
		}
	})
}
