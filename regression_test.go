package smtprelay_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
	"github.com/smtprelay/smtprelay/smtptest"
)

// answering dials a relay of which h gives the answer to each command line of the nth connection: to "" its greeting, to "."
// and BDAT when the body is in.
func answering(buf int, h func(n int, line string) string) func(ctx context.Context, _, _ string) (net.Conn, error) {
	var n atomic.Int64
	return func(context.Context, string, string) (net.Conn, error) {
		id := int(n.Add(1))
		c, s := netpipe.New(buf)
		go func() {
			defer s.Close()
			say := func(t string) bool {
				if t == "" {
					return true
				}
				_, err := io.WriteString(s, strings.ReplaceAll(t, "\n", "\r\n")+"\r\n")
				return err == nil
			}
			if !say(h(id, "")) {
				return
			}
			br := bufio.NewReader(s)
			data := false
			for {
				l, err := br.ReadString('\n')
				if err != nil {
					return
				}
				l = strings.TrimRight(l, "\r\n")
				if data && l != "." {
					continue
				}
				data = false
				if f := strings.Fields(l); len(f) > 1 && f[0] == "BDAT" {
					k, _ := strconv.Atoi(f[1])
					if _, err := io.CopyN(io.Discard, br, int64(k)); err != nil {
						return
					}
				}
				r := h(id, l)
				data = strings.HasPrefix(r, "354")
				if !say(r) || l == "QUIT" {
					return
				}
			}
		}()
		return c, nil
	}
}

// agree is a relay that takes everything, and offers what ext says.
func agree(ext, line string) string {
	switch {
	case line == "":
		return "220 hi"
	case strings.HasPrefix(line, "EHLO"):
		return "250-hi\n" + ext
	case line == "DATA":
		return "354 go"
	case line == "BDAT 8": // out of order
		return "503 MAIL first"
	case line == "QUIT":
		return "221 bye"
	case strings.HasPrefix(line, "AUTH"):
		return "235 ok"
	}
	return "250 ok"
}

func bubbleClient(t *testing.T, c smtprelay.Config) *smtprelay.Client {
	c.Addr, c.TLS, c.Chunking = "relay.example:587", smtprelay.TLSNone, true
	cl, err := smtprelay.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

func shortMessage(to ...string) smtprelay.Message {
	return smtprelay.Message{From: "a@x.example", To: to, Body: smtprelay.Bytes([]byte("Subject: x\r\n\r\nhello\r\n"))}
}

func TestPingEndsWithItsContextAtASilentAuth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Username: "u", Password: "secretkey", Dial: answering(0, func(_ int, l string) string {
			if strings.HasPrefix(l, "AUTH") {
				time.Sleep(time.Hour)
			}
			return agree("250-PIPELINING\n250 AUTH PLAIN", l)
		})})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		err := c.Ping(ctx)
		if took := time.Since(began); !errors.Is(err, context.DeadlineExceeded) || took != time.Second {
			t.Errorf("got %v after %v, want the context's error after a second", err, took)
		}
		c.Close()
		time.Sleep(2 * time.Hour)
	})
}

func TestKeyIsNotToldWhenA421QuotesIt(t *testing.T) {
	for i, ext := range []string{"250 AUTH PLAIN", "250-PIPELINING\n250 AUTH PLAIN"} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b64 := base64.StdEncoding.EncodeToString([]byte("\x00u\x00secretkey"))
				leak := func(where string, v any) {
					if s := fmt.Sprintf("%v", v); strings.Contains(s, b64) || strings.Contains(s, "secretkey") {
						t.Errorf("leak in %s: %s", where, s)
					}
				}
				c := bubbleClient(t, smtprelay.Config{Username: "u", Password: "secretkey", Retry: smtprelay.Retry{MaxAttempts: 1},
					Trace: &smtprelay.Trace{
						DialDone:   func(_ context.Context, d smtprelay.DialInfo) { leak("DialDone", d.Err) },
						ConnClosed: func(_ context.Context, d smtprelay.CloseInfo) { leak("ConnClosed", d.Err) },
					},
					Dial: answering(0, func(_ int, l string) string {
						if strings.HasPrefix(l, "AUTH") {
							return "421 4.7.0 too many errors after: " + l
						}
						return agree(ext, l)
					})})
				_, err := c.Send(t.Context(), shortMessage("b@y.example"))
				leak("Send", err)
				c.Close()
			})
		})
	}
}

func TestFirstRefusalOfAChunkIsTheOneTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refused bool
		c := bubbleClient(t, smtprelay.Config{Dial: answering(1<<20, func(_ int, l string) string {
			if strings.HasPrefix(l, "BDAT") && l != "BDAT 8" {
				if refused {
					return "503 5.5.1 bad sequence"
				}
				refused = true
				return "452 4.3.1 insufficient storage"
			}
			return agree("250-PIPELINING\n250-SIZE 10000000\n250 CHUNKING", l)
		})})
		m := shortMessage("b@y.example")
		m.Body = smtprelay.Bytes(bytes.Repeat([]byte("hello world, this\r\n"), 12000))
		_, err := c.Send(t.Context(), m)
		e := err.(*smtprelay.Error)
		if e.Code != 452 {
			t.Errorf("code %d, want 452; temporary=%v", e.Code, e.Temporary())
		}
		c.Close()
	})
}

func TestAllWhoWaitGoOnWhenADialSucceedsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		var dials atomic.Int64
		down.Store(true)
		inner := answering(0, func(n int, l string) string {
			if l == "." && n == 1 {
				time.Sleep(9 * time.Minute)
			}
			return agree("250 SIZE 1000", l)
		})
		c := bubbleClient(t, smtprelay.Config{Dial: func(ctx context.Context, a, b string) (net.Conn, error) {
			dials.Add(1)
			if down.Load() {
				return nil, errors.New("connection refused")
			}
			return inner(ctx, a, b)
		}})
		began := time.Now()
		took := make(chan time.Duration, 5)
		for range 5 {
			go func() {
				_, err := c.Send(t.Context(), shortMessage("b@y.example"))
				if err != nil {
					t.Log(err)
				}
				took <- time.Since(began)
			}()
		}
		synctest.Wait()
		down.Store(false)
		for range 4 { // all but the one on the slow connection
			if d := <-took; d > 10*time.Second {
				t.Errorf("a message took %v", d)
			}
		}
		<-took
		if n := dials.Load(); n > 5+5 { // those that were begun before the first was refused count too
			t.Errorf("%d connections tried, want one that was refused and another one for each message at most", n)
		}
		c.Close()
	})
}

func TestSilenceBehindALastChunkIsNotCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var bd atomic.Int64
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Dial: answering(0, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") {
				if bd.Add(1) == 1 {
					time.Sleep(100 * time.Millisecond)
				}
			}
			if l == "RSET" && bd.Load() == 1 {
				time.Sleep(6 * time.Second)
			}
			return agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
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

func TestAllOrNothingTakesASessionWithRoomForItsDomains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Dial: answering(0, func(n int, l string) string {
			return agree("250-PIPELINING\n250 LIMITS RCPTDOMAINMAX=2", l)
		})})
		for i, to := range [][]string{{"b@x.example"}, {"b@y.example", "c@z.example"}} {
			if err := c.SendMail("a@x.example", to, []byte("Subject: x\r\n\r\nx\r\n")); err != nil {
				t.Errorf("%d: %v", i, err)
			}
		}
		c.Close()
	})
}

func TestEachRecipientKeepsItsOwnReplyInAllOrNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Dial: answering(0, func(n int, l string) string {
			switch {
			case strings.Contains(l, "<b@"):
				return "550 5.1.1 no b"
			case strings.Contains(l, "<c@"):
				return "451 4.7.1 c is greylisted"
			}
			return agree("250 PIPELINING", l)
		})})
		m := shortMessage("b@y.example", "c@y.example", "d@y.example")
		m.AllOrNothing = true
		r, err := c.Send(t.Context(), m)
		if err == nil {
			t.Error("no error")
		}
		if r.Recipients[1].Code != 451 {
			t.Errorf("c: %v", r.Recipients[1].Reply)
		}
		c.Close()
	})
}

func TestShortSessionsDoNotHoldBackOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var conns atomic.Int64
		c := bubbleClient(t, smtprelay.Config{Dial: answering(0, func(n int, l string) string {
			conns.Store(max(conns.Load(), int64(n)))
			if l == "." {
				time.Sleep(500 * time.Millisecond)
			}
			return agree("250-PIPELINING\n250 LIMITS MAILMAX=20", l)
		})})
		c.Send(t.Context(), shortMessage("b@y.example"))
		done := make(chan bool, 15)
		for range 15 {
			go func() { c.Send(t.Context(), shortMessage("b@y.example")); done <- true }()
		}
		for range 15 {
			<-done
		}
		if n := conns.Load(); n < 5 {
			t.Errorf("15 messages at once on %d connections", n)
		}
		c.Close()
	})
}

type slowBody struct{}

func (slowBody) WriteTo(w io.Writer) (int64, error) {
	time.Sleep(2 * time.Second)
	n, err := w.Write(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), 124))
	return int64(n), err
}

func TestCancelledMessageLeavesThoseInItsBufferAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stall := make(chan struct{})
		dial := func(context.Context, string, string) (net.Conn, error) {
			c, s := netpipe.New(600)
			go func() {
				defer s.Close()
				br := bufio.NewReaderSize(s, 16)
				io.WriteString(s, "220 hi\r\n")
				n := 0
				for {
					l, err := br.ReadString('\n')
					if err != nil {
						return
					}
					l = strings.TrimSpace(l)
					if f := strings.Fields(l); len(f) > 1 && f[0] == "BDAT" {
						k, _ := strconv.Atoi(f[1])
						io.CopyN(io.Discard, br, int64(k))
						if n++; n == 4 { // the question first, then what is sent of A: a chunk and the end
							<-stall
						}
					}
					io.WriteString(s, strings.ReplaceAll(agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l), "\n", "\r\n")+"\r\n")
				}
			}()
			return c, nil
		}
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: dial})
		big := func() smtprelay.Message {
			m := shortMessage("b@y.example")
			m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), 30))
			return m
		}
		res := make(chan string, 5)
		send := func(ctx context.Context, name string, m smtprelay.Message) {
			go func() { _, err := c.Send(ctx, m); res <- fmt.Sprintf("%s: %v", name, err) }()
			synctest.Wait()
		}
		m := big()
		m.Body = slowBody{}
		send(t.Context(), "A", m)
		send(t.Context(), "B", big())
		send(t.Context(), "C", big())
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		send(ctx, "D", big())
		send(t.Context(), "E", big())
		time.Sleep(time.Minute)
		close(stall)
		for range 5 {
			if r := <-res; !strings.HasPrefix(r, "D") && !strings.HasSuffix(r, ": <nil>") {
				t.Error(r)
			}
		}
		c.Close()
	})
}

// A relay that takes 100 octets a second is slow, but moving: no limit for a reply runs while its message is being written.
func TestSlowRelayIsNotGivenUpWhileItReads(t *testing.T) {
	for _, extensions := range []string{"250-SIZE 1000000\n250 PIPELINING", "250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING"} {
		synctest.Test(t, func(t *testing.T) {
			var taken atomic.Int64
			dial := func(context.Context, string, string) (net.Conn, error) {
				c, s := netpipe.New(200)
				go func() {
					defer s.Close()
					br := bufio.NewReader(slowReader{s})
					io.WriteString(s, "220 hi\r\n")
					for {
						l, err := br.ReadString('\n')
						if err != nil {
							return
						}
						l = strings.TrimSpace(l)
						switch f := strings.Fields(l); {
						case l == "DATA":
							io.WriteString(s, "354 go\r\n")
							n, _ := io.Copy(io.Discard, textproto.NewReader(br).DotReader())
							taken.Add(n)
							l = "."
						case len(f) > 1 && f[0] == "BDAT":
							k, _ := strconv.ParseInt(f[1], 10, 64)
							n, _ := io.CopyN(io.Discard, br, k)
							taken.Add(n)
						}
						io.WriteString(s, strings.ReplaceAll(agree(extensions, l), "\n", "\r\n")+"\r\n")
					}
				}()
				return c, nil
			}
			ten := 10 * time.Second
			c := bubbleClient(t, smtprelay.Config{
				Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: dial,
				Timeouts: smtprelay.Timeouts{Command: ten, Data: ten, FinalReply: ten, Write: ten},
			})
			for _, size := range []int{10_000, 150_000} {
				m := shortMessage("b@y.example")
				m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), size/33))
				if _, err := c.Send(t.Context(), m); err != nil {
					t.Errorf("%d octets: %v", size, err)
				}
				m.Body = pieces{bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), size/33), 5000}
				if _, err := c.Send(t.Context(), m); err != nil {
					t.Errorf("%d octets of a size not known: %v", size, err)
				}
			}
			c.Close()
			time.Sleep(time.Minute)
			if n := taken.Load(); n < 300_000 {
				t.Errorf("the relay has %d octets", n)
			}
		})
	}
}

// slowReader reads 100 octets a second.
type slowReader struct{ net.Conn }

func (r slowReader) Read(p []byte) (int, error) {
	time.Sleep(time.Second)
	return r.Conn.Read(p[:min(len(p), 100)])
}

func TestMessageIsNotSentTwiceWhenOneRecipientIsAnswered421(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got atomic.Int64
		c := bubbleClient(t, smtprelay.Config{Dial: answering(0, func(n int, l string) string {
			if strings.Contains(l, "<c@") && n == 1 {
				return "421 4.7.28 try c again later"
			}
			if strings.HasPrefix(l, "BDAT") {
				got.Add(1)
				time.Sleep(8 * time.Second)
			}
			return agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})})
		_, err := c.Send(t.Context(), shortMessage("b@y.example", "c@y.example"))
		if n := got.Load(); n > 1 {
			t.Errorf("the relay has it %d times; told %v", n, err)
		}
		c.Close()
		time.Sleep(time.Minute)
	})
}

func TestLastChunkIsNotSentOnceAChunkWasRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Dial: answering(0, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") && !strings.HasSuffix(l, "LAST") {
				return "452 4.3.1 no room for this chunk"
			}
			return agree("250-PIPELINING\n250-SIZE 10000000\n250 CHUNKING", l)
		})})
		m := shortMessage("b@y.example")
		m.Body = slowChunks{}
		_, err := c.Send(t.Context(), m)
		if err == nil {
			t.Error("truncated message, chunk known to be refused, reported accepted")
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

// B, a large message behind A, is cancelled while its write is blocked: A's final reply, due in 20 s, is awaited for 2 s only.
func TestCancelledWriteDoesNotHurryTheFinalReplyOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: answering(600, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") {
				time.Sleep(20 * time.Second)
			}
			return agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})})
		res := make(chan error, 1)
		go func() {
			_, err := c.Send(t.Context(), shortMessage("b@y.example"))
			res <- err
		}()
		time.Sleep(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		m := shortMessage("b@y.example")
		m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), 3000))
		if _, err := c.Send(ctx, m); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the context's error", err)
		}
		if err := <-res; err != nil {
			t.Errorf("its neighbour was told %v", err)
		}
		c.Close()
		time.Sleep(time.Hour)
	})
}

func TestConnectionThatIsOldBeforeItIsReadyCarriesAMessage(t *testing.T) {
	for _, age := range []time.Duration{5 * time.Second, time.Nanosecond} {
		synctest.Test(t, func(t *testing.T) {
			var conns atomic.Int64
			c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1, MaxConnAge: age}, Dial: answering(0, func(n int, l string) string {
				conns.Store(int64(n))
				if l == "" {
					time.Sleep(6 * time.Second) // as a relay does that waits for who speaks first
				}
				return agree("250 PIPELINING", l)
			})})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for i := range 3 {
				if _, err := c.Send(ctx, shortMessage("b@y.example")); err != nil {
					t.Errorf("age %v, message %d: %v", age, i, err)
				}
			}
			c.Close()
			if n := conns.Load(); n != 3 {
				t.Errorf("age %v: %d connections for 3 messages", age, n)
			}
			time.Sleep(time.Minute)
		})
	}
}

// To be wrong about overlap is to take twice the round trips for as long as the Client lives.
func TestOverlapGoesOnAfterWhatSaysNothingAboutIt(t *testing.T) {
	for _, test := range []struct {
		why   string
		leave bool // the relay says 421 to the RSET behind the first final dot
	}{
		{"a caller gives up while the RSET behind a final dot has no reply", false},
		{"the relay leaves", true},
	} {
		t.Run(test.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Dial: answering(0, func(n int, l string) string {
					if l == "." || l == "RSET" {
						time.Sleep(time.Second)
					}
					if l == "RSET" && n == 1 && test.leave {
						return "421 4.3.2 shutting down"
					}
					return agree("250 PIPELINING", l)
				})})
				send := func(ctx context.Context) {
					go c.Send(ctx, shortMessage("b@y.example"))
					synctest.Wait()
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				send(t.Context())
				send(ctx)
				if !test.leave {
					time.Sleep(1500 * time.Millisecond)
					cancel()
				}
				time.Sleep(time.Minute)
				before := c.Stats().Overlapped
				for range 3 {
					send(t.Context())
				}
				time.Sleep(time.Minute)
				if n := c.Stats().Overlapped - before; before != 1 || n != 2 {
					t.Errorf("%d of 1 messages overlapped before, and %d of 2 afterwards", before, n)
				}
				c.Close()
				time.Sleep(time.Minute)
			})
		})
	}
}

func TestRelayThatBreaksOverlapIsNoticedByCallersInAHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far, func(s *smtptest.Server) { s.Behind = smtptest.HabitDiscard })
		cfg := configOf(relay)
		cfg.Limits.MaxConns = 1
		client := newClient(t, cfg)
		failed := 0
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // less than Timeouts.Overlap
			var pair sync.WaitGroup
			var errs atomic.Int64
			for i := range 2 {
				pair.Go(func() {
					if _, err := client.Send(ctx, numbered(i)); err != nil {
						errs.Add(1)
					}
				})
			}
			pair.Wait()
			cancel()
			failed += int(errs.Load())
		}
		atMost(t, "messages that failed", failed, 1)
	})
}

func TestContextEndsAllOrNothingBehindAnothersLastChunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Dial: answering(0, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") {
				time.Sleep(time.Minute)
			}
			return agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})})
		first := make(chan error, 1)
		go func() {
			m := shortMessage("b@y.example")
			m.Body = slowBody{}
			_, err := c.Send(t.Context(), m)
			first <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		began := time.Now()
		m := shortMessage("b@y.example", "c@y.example")
		m.AllOrNothing = true
		_, err := c.Send(ctx, m)
		if took := time.Since(began); !errors.Is(err, context.DeadlineExceeded) || !smtprelay.SafeToRetry(err) || took != 10*time.Second {
			t.Errorf("got %v after %v, want the context's error after 10 s", err, took)
		}
		if err := <-first; err != nil {
			t.Errorf("the message before: %v", err)
		}
		c.Close()
		time.Sleep(time.Minute)
	})
}

// noDeadlines is a connection like those through SSH.
type noDeadlines struct{ net.Conn }

var errNoDeadline = errors.New("deadline not supported")

func (noDeadlines) SetDeadline(time.Time) error      { return errNoDeadline }
func (noDeadlines) SetReadDeadline(time.Time) error  { return errNoDeadline }
func (noDeadlines) SetWriteDeadline(time.Time) error { return errNoDeadline }

func TestDialThatReturnsNoUsableConnectionIsTold(t *testing.T) {
	silent := answering(0, func(_ int, l string) string { return "" })
	for _, test := range []struct {
		dial func(context.Context, string, string) (net.Conn, error)
		want string
	}{
		{func(context.Context, string, string) (net.Conn, error) { return nil, nil }, "neither a connection nor an error"},
		{func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := silent(ctx, network, addr)
			return noDeadlines{conn}, err
		}, "takes no deadlines: deadline not supported"},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := bubbleClient(t, smtprelay.Config{Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: test.dial})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			_, err := c.Send(ctx, shortMessage("b@y.example"))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
			c.Close() // and does not wait for the relay
		})
	}
}

// keptWriter is a body that writes once more to what the body before it was given.
type keptWriter struct {
	kept *io.Writer
	late *error
}

func (b keptWriter) WriteTo(w io.Writer) (int64, error) {
	if *b.kept != nil {
		_, *b.late = io.WriteString(*b.kept, "of another message\r\n")
	}
	*b.kept = w
	n, err := io.WriteString(w, "Subject: x\r\n\r\nhello\r\n")
	return int64(n), err
}

func TestBodyThatWritesLateDoesNotWriteIntoAnotherMessage(t *testing.T) {
	for _, chunking := range []bool{false, true} {
		relay := newRelay(t, func(s *smtptest.Server) { s.Chunking = chunking })
		client := newClient(t, configOf(relay))
		var kept io.Writer
		var late error
		for range 5 {
			m := shortMessage("b@y.example")
			m.Body = keptWriter{&kept, &late}
			if _, err := client.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		if late == nil {
			t.Errorf("chunking %v: what was written late was taken", chunking)
		}
		for _, m := range relay.Messages() {
			if strings.Contains(string(m.Body), "of another message") {
				t.Errorf("chunking %v: a message has it: %q", chunking, m.Body)
			}
		}
	}
}

// A relay that has stopped reading holds up whoever writes for a while, but nobody beyond his context.
func TestContextEndsASendThatCarriesAnothersFinalDotToAStalledRelay(t *testing.T) {
	for _, test := range []struct {
		extensions   string
		window, size int
		recipients   int
	}{
		{"250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING", 64 << 10, 13_000, 1},
		{"250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING", 600, 1000, 1},
		{"250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING", 600, 1000, 1000},
		{"250 PIPELINING", 600, 1000, 1},
		{"250 PIPELINING", 600, 1000, 1000},
		{"250 PIPELINING", 600, 16300, 1},
	} {
		t.Run(fmt.Sprintf("%v", test), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stall := make(chan struct{})
				dial := func(context.Context, string, string) (net.Conn, error) {
					c, s := netpipe.New(test.window)
					go func() {
						defer s.Close()
						br := bufio.NewReaderSize(s, 16)
						io.WriteString(s, "220 hi\r\n")
						for l := ""; ; {
							var err error
							if l, err = br.ReadString('\n'); err != nil {
								return
							}
							l = strings.TrimSpace(l)
							if f := strings.Fields(l); len(f) > 1 && f[0] == "BDAT" {
								k, _ := strconv.Atoi(f[1])
								io.CopyN(io.Discard, br, int64(k))
								<-stall
							}
							if _, err := io.WriteString(s, strings.ReplaceAll(agree(test.extensions, l), "\n", "\r\n")+"\r\n"); err != nil {
								return
							}
							if l == "DATA" {
								br.ReadString('\n')
								<-stall
								io.Copy(io.Discard, textproto.NewReader(br).DotReader())
								io.WriteString(s, "250 ok\r\n")
							}
						}
					}()
					return c, nil
				}
				c := bubbleClient(t, smtprelay.Config{Dial: dial, Limits: smtprelay.Limits{MaxConns: 1, MaxInFlight: 32}})
				var senders sync.WaitGroup
				for i := range 20 {
					senders.Go(func() {
						m := shortMessage("b@y.example")
						if m.Body = (slowBody{}); i > 0 {
							for range test.recipients - 1 {
								m.To = append(m.To, "b@y.example")
							}
							m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcd\r\n"), test.size/32))
							time.Sleep(time.Second)
						}
						ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
						defer cancel()
						began := time.Now()
						_, err := c.Send(ctx, m)
						if took := time.Since(began); took > 10*time.Second {
							t.Errorf("message %d: %v after %v", i, err, took)
						}
					})
				}
				senders.Wait()
				close(stall)
				c.Close()
				time.Sleep(time.Hour)
			})
		})
	}
}
