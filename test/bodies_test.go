// Bodies by their kind: readers, writers of unknown size, writers that do not stop.
package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtpapi"
	"github.com/smtprelay/smtprelay/smtptest"
)

func withoutSize(s *smtptest.Server) { s.Without = []string{"SIZE"} }

// A body of unknown size is sent by DATA if the relay has not announced a size limit. The decision falls in the middle of the
// body: wherever that is, dots are doubled from there on and no line end is lost.
func TestBodyOfUnknownSizeIsSentByDataIfTheRelayAnnouncesNoSize(t *testing.T) {
	text := append([]byte("Subject: dots\r\n\r\n"), bytes.Repeat([]byte(".\r\n..x\r\nplain\r\n"), 6000)...)
	for _, size := range []int{7, 100, 4096, 1 << 20} {
		for shift := range 16 { // moves the end of the buffer to each position
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, inChunks, withoutSize)
				client := newClient(t, configOf(relay))
				body := append(bytes.Repeat([]byte("y"), shift), text...)
				_, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: pieces{body, size}})
				if err != nil {
					t.Fatal(err)
				}
				got := relay.Messages()
				if len(got) != 1 || !bytes.Equal(got[0].Body, body) {
					t.Fatalf("pieces of %d, shifted by %d: the body arrived changed", size, shift)
				}
				if n := relay.Conns()[0].Commands["DATA"]; n != 1 {
					t.Errorf("%d DATA, want 1", n)
				}
			})
		}
	}
}

func TestBodyOfUnknownSizeIsNotSentByDataWithoutRecipient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, inChunks, withoutSize)
		relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 nobody"})
		client := newClient(t, configOf(relay))
		m := smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: pieces{bytes.Repeat([]byte("text\r\n"), 20000), 1000}}
		if _, err := client.Send(t.Context(), m); smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
			t.Errorf("got %v, want the refusal of the recipient", err)
		}
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Errorf("the next message on the connection: %v", err)
		}
		if n := len(relay.Messages()); n != 1 {
			t.Errorf("%d messages, want the second one", n)
		}
	})
}

// A body that can be read only once is retried if the relay refuses before more than its first chunk is used.
func TestReaderIsRetriedIfItsFirstChunkIsRefused(t *testing.T) {
	const chunk = 64 << 10
	for _, size := range []int{1, 1000, chunk - 1, chunk, chunk + 1, chunk + 2, chunk + 3, 3 * chunk} {
		for _, fault := range []smtptest.Fault{
			{At: smtptest.Mail, Reply: "421 4.7.0 too many messages on this connection", Drop: true},
			{At: smtptest.Rcpt, Reply: "421 4.3.2 going down"},
			{At: smtptest.Bdat, Reply: "421 4.3.2 going down", Drop: true},
		} {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, inChunks, func(s *smtptest.Server) { s.Delay = time.Second })
				relay.Fault(fault)
				client := newClient(t, configOf(relay))
				body := append(bytes.Repeat([]byte("x"), size-1), '\n')
				_, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Reader(struct{ io.Reader }{bytes.NewReader(body)})})
				if err != nil {
					t.Fatalf("%d octets, %v at %v: %v", size, fault.Reply, fault.At, err)
				}
				want := append(body[:size-1:size-1], "\r\n"...)
				if got := relay.Messages(); len(got) != 1 || !bytes.Equal(got[0].Body, want) {
					t.Errorf("%d octets, %v at %v: %d messages, or a changed body", size, fault.Reply, fault.At, len(got))
				}
			})
		}
	}
}

func TestReaderIsNotRetriedOnceMoreThanItsFirstChunkIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, inChunks)
		relay.Fault(smtptest.Fault{At: smtptest.Body, AfterBytes: 100_000, Abort: true})
		client := newClient(t, configOf(relay))
		body := struct{ io.Reader }{strings.NewReader(strings.Repeat("x\r\n", 100_000))}
		_, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Reader(body)})
		if smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || len(relay.Messages()) != 0 {
			t.Errorf("%v, and %d messages; want not accepted, and none", err, len(relay.Messages()))
		}
	})
}

// keptWriter is a body that keeps writing to the Writer of an earlier body.
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

// again returns bodies of 100 KB that can be written more than once.
func again(t *testing.T) map[string]io.WriterTo {
	text := strings.Repeat("Subject: x\r\n", 8_000)
	path := filepath.Join(t.TempDir(), "mail")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return map[string]io.WriterTo{
		"bytes.Buffer":             bytes.NewBufferString(text),
		"bytes.Reader":             bytes.NewReader([]byte(text)),
		"strings.Reader in Reader": smtprelay.Reader(strings.NewReader(text)),
		"file":                     file,
		"file in Reader":           smtprelay.Reader(file),
		"BodyFunc":                 smtprelay.BodyFunc(func(w io.Writer) error { _, err := io.WriteString(w, text); return err }),
	}
}

func TestRepeatableBodyIsRetriedAfterAFailureInTheMiddle(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		for name, body := range again(t) {
			relay := newRelay(t, near)
			client := newClient(t, configOf(relay))
			lost := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "421 4.3.2 bye", Drop: true})
			m := shortMessage("b@y.example")
			m.Body = body
			for range 2 { // a message that is sent again is sent completely
				if _, err := client.Send(t.Context(), m); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			if lost.Hits() != 1 {
				t.Errorf("%s: no try failed", name)
			}
			for _, got := range relay.Messages() {
				if n := len(got.Body); n != 96_000 {
					t.Errorf("%s: %d octets arrived, want 96,000", name, n)
				}
			}
		}
	})
}

// Without SIZE= a relay with a limit reads the whole body before it refuses.
func TestSizeOfBodyInMemoryIsDeclared(t *testing.T) {
	relay := newRelay(t, func(s *smtptest.Server) { s.MaxSize = 50_000 })
	client := newClient(t, configOf(relay))
	bodies := again(t)
	for _, name := range []string{"bytes.Buffer", "bytes.Reader", "strings.Reader in Reader"} {
		m := shortMessage("b@y.example")
		m.Body = bodies[name]
		if _, err := client.Send(t.Context(), m); err == nil || commands(relay, "DATA")+commands(relay, "MAIL") != 0 {
			t.Errorf("%s: got %v and %d commands, want it refused before one is sent", name, err, commands(relay, "MAIL"))
		}
	}
}

func TestErrorSaysThatTheBodyCanBeReadOnlyOnce(t *testing.T) {
	const words = "the Body can be read only once: use Bytes, BodyFunc or a Reader that can seek"
	once := func() io.WriterTo {
		return smtprelay.Reader(struct{ io.Reader }{strings.NewReader("Subject: x\r\n\r\nhi\r\n")})
	}
	for _, tt := range []struct {
		why   string
		limit int
		fault smtptest.Fault
		lists string // Error.Outcome, and the recipients of RetryTo
		mails int
	}{
		{"known before anything is sent: two transactions", 1, smtptest.Fault{}, "not accepted []", 0},
		{"the connection is lost", 0, smtptest.Fault{At: smtptest.FinalDot, Reply: "421 4.3.2 bye", Drop: true}, "not accepted [b@y.example c@y.example]", 1},
		{"the relay accepts fewer recipients than announced", 0, smtptest.Fault{At: smtptest.Rcpt, Rcpt: "c@y.example", Reply: "452 4.5.3 too many recipients"}, "accepted [c@y.example]", 1},
	} {
		t.Run(tt.why, func(t *testing.T) {
			relay := newRelay(t)
			if tt.fault.At != 0 {
				relay.Fault(tt.fault)
			}
			cfg := configOf(relay)
			cfg.Limits.MaxRecipients = tt.limit
			m := shortMessage("b@y.example", "c@y.example")
			m.Body = once()
			_, err := newClient(t, cfg).Send(t.Context(), m)
			if err == nil || !strings.Contains(err.Error(), words) {
				t.Errorf("got %v, want it to contain %q", err, words)
			}
			if got := fmt.Sprint(smtprelay.OutcomeOf(err), " ", smtprelay.RetryTo(err)); got != tt.lists {
				t.Errorf("got %s, want %s", got, tt.lists)
			}
			if n := commands(relay, "DATA"); n != tt.mails {
				t.Errorf("%d DATA, want %d", n, tt.mails)
			}
		})
	}
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
			t.Errorf("chunking %v: the late write was accepted", chunking)
		}
		for _, m := range relay.Messages() {
			if strings.Contains(string(m.Body), "of another message") {
				t.Errorf("chunking %v: a message contains it: %q", chunking, m.Body)
			}
		}
	}
}

// stuckReader returns some octets, and then nothing, without an error.
type stuckReader struct{ left int }

func (r *stuckReader) Read(p []byte) (int, error) {
	n := min(len(p), r.left)
	r.left -= n
	return copy(p, bytes.Repeat([]byte("x"), n)), nil
}

func TestReaderWithoutProgressIsGivenUp(t *testing.T) {
	for _, chunking := range []bool{false, true} {
		for _, octets := range []int{0, 1, 100_000} {
			for name, wrap := range map[string]func(io.WriterTo) io.WriterTo{
				"Reader":  func(b io.WriterTo) io.WriterTo { return b },
				"Prepend": func(b io.WriterTo) io.WriterTo { return smtpapi.Prepend(smtpapi.Header{}, b) },
			} {
				relay := newRelay(t, inChunks, func(s *smtptest.Server) { s.Chunking = chunking })
				client := newClient(t, configOf(relay))
				m := shortMessage("b@y.example")
				m.Body = wrap(smtprelay.Reader(&stuckReader{octets}))
				_, err := client.Send(t.Context(), m)
				if !errors.Is(err, io.ErrNoProgress) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
					t.Errorf("chunking %v, %s, %d octets: %v, want io.ErrNoProgress and not accepted", chunking, name, octets, err)
				}
			}
		}
	}
}

// Buffered small writes arrive completely: nothing is lost at the end, before a large write, or if the last write fills the
// buffer.
func TestBodyOfSmallAndLargeWritesArrivesComplete(t *testing.T) {
	for _, chunking := range []bool{false, true} {
		relay := newRelay(t, inChunks, func(s *smtptest.Server) { s.Chunking = chunking })
		client := newClient(t, configOf(relay))
		for _, sizes := range [][]int{{1}, {511, 1}, {512}, {513}, {1, 512, 1}, {1, 600, 1}, {300, 300, 300}, {1, 70_000, 1}} {
			var want bytes.Buffer
			body := writes(nil)
			for i, n := range sizes {
				body = append(body, bytes.Repeat([]byte{byte('a' + i)}, n))
				want.Write(body[i])
			}
			m := shortMessage("b@y.example")
			m.Body = body
			if _, err := client.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			all := relay.Messages()
			if got := all[len(all)-1].Body; string(got) != want.String()+"\r\n" {
				t.Errorf("chunking %v, writes of %v: %d octets arrived, want %d", chunking, sizes, len(got), want.Len()+2)
			}
		}
	}
}

// writes is a body that is written in these pieces.
type writes [][]byte

func (ws writes) WriteTo(w io.Writer) (total int64, err error) {
	for _, p := range ws {
		n, err := w.Write(p)
		if total += int64(n); err != nil {
			return total, err
		}
	}
	return total, nil
}

// A body that is written slowly in small pieces gets an error soon after its context has ended, even while its output is
// buffered.
func TestBodyOfSmallWritesNoticesTheEndOfItsContext(t *testing.T) {
	for _, chunking := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			relay := newRelay(t, inChunks, func(s *smtptest.Server) { s.Chunking = chunking })
			client := newClient(t, configOf(relay))
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second+time.Millisecond)
			defer cancel()
			body := &slowOctets{}
			m := shortMessage("b@y.example")
			m.Body = body
			_, err := client.Send(ctx, m)
			if smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || !errors.Is(err, context.DeadlineExceeded) || body.taken != 11 {
				t.Errorf("chunking %v: %v after %d octets, want the context's error after 11", chunking, err, body.taken)
			}
		})
	}
}

// slowOctets writes an octet per second.
type slowOctets struct{ taken int64 }

func (b *slowOctets) WriteTo(w io.Writer) (int64, error) {
	for {
		if _, err := w.Write([]byte("x")); err != nil {
			return b.taken, err
		}
		b.taken++
		time.Sleep(time.Second)
	}
}

// generator is a body of size bytes that fails after failAt of them, if that is not negative. While it writes it measures the
// memory in use.
type generator struct {
	size, failAt int64
	look         func()
}

var errGenerator = errors.New("the generator is broken")

func (g *generator) WriteTo(w io.Writer) (written int64, err error) {
	const lookEvery = 64 << 20
	block := bytes.Repeat([]byte("Seventy-seven octets and a line end, so that this is a mail like any other..\r\n"), 420)
	end := g.size
	if g.failAt >= 0 {
		end = g.failAt
	}
	for next := int64(0); written < end; {
		n, err := w.Write(block[:min(int64(len(block)), end-written)])
		written += int64(n)
		if err != nil {
			return written, err
		}
		if written >= next && g.look != nil {
			g.look()
			next = written + lookEvery
		}
	}
	if g.failAt >= 0 {
		return written, errGenerator
	}
	return written, nil
}

func TestBodyOfOneGiBPassesInConstantMemory(t *testing.T) {
	sendOneGiB(t, "250-PIPELINING\n250 SIZE")
}

func TestBodyOfOneGiBPassesInConstantMemoryInChunks(t *testing.T) {
	sendOneGiB(t, "250-PIPELINING\n250-SIZE 2000000000\n250 CHUNKING")
}

// sendOneGiB sends a message of 1 GiB to a relay with these extensions, and checks that it needs no memory.
func sendOneGiB(t *testing.T, extensions string) {
	t.Helper()
	var received relaytest.Octets
	relay := &relaytest.Relay{Body: &received, Answer: func(_ int, line string) string { return relaytest.Agree(extensions, line) }}
	client := newClient(t, smtprelay.Config{Addr: "sink.example:25", TLS: smtprelay.TLSNone, Chunking: true, Dial: relay.Dial})
	inUse := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var before, peak uint64
	body := &generator{size: largeBody, failAt: -1, look: func() {
		if before == 0 {
			before = inUse() // the connection is ready and the first block written
		}
		peak = max(peak, inUse())
	}}
	if _, err := client.Send(t.Context(), smtprelay.Message{From: "a@example.com", To: []string{"b@example.org"}, Body: body}); err != nil {
		t.Fatal(err)
	}
	if n := received.Load(); n < largeBody {
		t.Errorf("the relay received %d bytes, want at least %d", n, largeBody)
	}
	if grown := int64(peak) - int64(before); grown >= 1<<20 {
		t.Errorf("memory grew by %d KiB while %d MiB were sent, want less than 1 MiB", grown>>10, largeBody>>20)
	}
}

func TestTruncatedBodyIsNeverAccepted(t *testing.T) {
	const size = 200_000
	for _, test := range []struct {
		name   string
		failAt int64
	}{
		{"fails at byte 0", 0},
		{"fails in the middle", size / 2},
		{"fails at the last byte", size - 1},
		{"fails after the last byte", size},
	} {
		t.Run(test.name, func(t *testing.T) {
			relay := newRelay(t)
			client := newClient(t, configOf(relay))
			m := numbered(0)
			m.Body = &generator{size: size, failAt: test.failAt}
			_, err := client.Send(t.Context(), m)
			if !errors.Is(err, errGenerator) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
				t.Errorf("got %v, want the writer's error, not accepted", err)
			}
			t.Log(err)

			// The relay's count is final once another message was sent and everything is closed.
			sendNumbered(t, client, 1, 1)
			if err := client.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			relay.Close()
			want(t, "accepted by the relay", relay.Stats().Accepted, 1)
		})
	}
}
