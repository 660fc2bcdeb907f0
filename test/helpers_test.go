// Package test has the tests of the client's behaviour, by topic, through its public interface only. Tests that depend on time
// use the time of a synctest bubble. TESTING.md says where a new test goes.
//
// This file has the helpers for several topics. Helpers for one topic are in its file.
package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// newRelay returns a started relay with STARTTLS that is closed at the end of the test.
func newRelay(t *testing.T, set ...func(*smtptest.Server)) *smtptest.Server {
	t.Helper()
	relay := smtptest.NewUnstartedServer()
	for _, f := range set {
		f(relay)
	}
	relay.Start()
	t.Cleanup(relay.Close)
	return relay
}

// configOf is the configuration for relay, with Chunking if the relay offers it.
func configOf(relay *smtptest.Server) smtprelay.Config {
	cfg := relay.Config()
	cfg.Chunking = relay.Chunking
	return cfg
}

func newClient(t *testing.T, cfg smtprelay.Config) *smtprelay.Client {
	t.Helper()
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// far makes a relay in memory, for a synctest bubble, at a distance of 20 ms.
func far(s *smtptest.Server) {
	s.InMemory = true
	s.Delay = 20 * time.Millisecond
	s.DropBodies = true
}

// numbered returns the ith of many different messages.
func numbered(i int) smtprelay.Message {
	return smtprelay.Message{
		From: "shop@example.com",
		To:   []string{fmt.Sprintf("customer%d@example.org", i)},
		Body: smtprelay.Bytes(fmt.Appendf(nil, "Subject: order %d\r\n\r\nIt is ready.\r\n", i)),
	}
}

// sendNumbered sends n messages from the given number of goroutines and fails the test if one of them is not accepted.
func sendNumbered(t *testing.T, client *smtprelay.Client, n, goroutines int) {
	t.Helper()
	numbers := make(chan int)
	var senders sync.WaitGroup
	for range goroutines {
		senders.Go(func() {
			for i := range numbers {
				if _, err := client.Send(t.Context(), numbered(i)); err != nil {
					t.Errorf("message %d: %v", i, err)
				}
			}
		})
	}
	for i := range n {
		numbers <- i
	}
	close(numbers)
	senders.Wait()
}

// want fails the test if a figure differs.
func want(t *testing.T, what string, got, want int) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %d, want %d", what, got, want)
	}
}

func atMost(t *testing.T, what string, got, most int) {
	t.Helper()
	if got > most {
		t.Errorf("%s: got %d, want at most %d", what, got, most)
	}
}

// commands is how many commands with that verb the relay has received.
func commands(relay *smtptest.Server, verb string) (n int) {
	for _, c := range relay.Conns() {
		n += c.Commands[verb]
	}
	return n
}

// inBothModes runs a test in a bubble with a relay that accepts bodies by DATA, and again with one that accepts them in chunks.
// near makes a relay of that kind, in memory and without TLS.
func inBothModes(t *testing.T, f func(t *testing.T, near func(*smtptest.Server))) {
	t.Helper()
	for _, chunking := range []bool{false, true} {
		name := map[bool]string{false: "by DATA", true: "in chunks"}[chunking]
		t.Run(name, func(t *testing.T) {
			t.Parallel() // with the other mode
			synctest.Test(t, func(t *testing.T) {
				f(t, func(s *smtptest.Server) {
					s.InMemory, s.NoTLS, s.Chunking = true, true, chunking
				})
			})
		})
	}
}

// bodyStep is the step of the command before the body, DATA or BDAT.
func bodyStep(relay *smtptest.Server) smtptest.Step {
	if relay.Chunking {
		return smtptest.Bdat
	}
	return smtptest.Data
}

// sent is the result of a message.
type sent struct {
	number  int
	receipt smtprelay.Receipt
	err     error
	began   time.Time
	took    time.Duration
}

func (s sent) outcome() smtprelay.Outcome {
	if s.err == nil {
		return smtprelay.Accepted
	}
	return failure(s.err).Outcome
}

// failure returns err as the *Error that it must be.
func failure(err error) *smtprelay.Error {
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok {
		return &smtprelay.Error{Op: "no *Error", Err: err}
	}
	return e
}

// sendAtOnce sends n messages, numbered from first, all at the same time, and returns their results in order.
func sendAtOnce(ctx context.Context, client *smtprelay.Client, first, n int) []sent {
	results := make([]sent, n)
	var senders sync.WaitGroup
	for i := range n {
		senders.Go(func() { results[i] = sendOne(ctx, client, first+i) })
	}
	senders.Wait()
	return results
}

func sendOne(ctx context.Context, client *smtprelay.Client, number int) sent {
	s := sent{number: number, began: time.Now()}
	s.receipt, s.err = client.Send(ctx, numbered(number))
	s.took = time.Since(s.began)
	return s
}

// checkLedger compares what the callers were told with what the relay has: it has each accepted message once, under the queue ID
// of its receipt, no message that was not accepted, and at most one copy of each unknown message.
func checkLedger(t *testing.T, relay *smtptest.Server, results []sent) {
	t.Helper()
	ids := map[string][]string{}
	for _, m := range relay.Messages() {
		ids[m.To[0]] = append(ids[m.To[0]], m.ID)
	}
	accepted := 0
	for _, s := range results {
		got := ids[numbered(s.number).To[0]]
		switch s.outcome() {
		case smtprelay.Accepted:
			accepted++
			if len(got) != 1 || got[0] != s.receipt.QueueID {
				t.Errorf("message %d was accepted as %q; the relay has it as %q", s.number, s.receipt.QueueID, got)
			}
		case smtprelay.NotAccepted:
			if len(got) != 0 {
				t.Errorf("message %d was not accepted (%v); the relay has it as %q", s.number, s.err, got)
			}
		default:
			if len(got) > 1 {
				t.Errorf("message %d is unknown; the relay has it %d times", s.number, len(got))
			}
		}
	}
	if accepted > relay.Stats().Accepted {
		t.Errorf("%d messages were accepted; the relay has %d", accepted, relay.Stats().Accepted)
	}
	want(t, "duplicates", relay.Stats().Duplicates, 0)
}

// allAccepted fails the test for each message that was not accepted, and checks the ledger.
func allAccepted(t *testing.T, relay *smtptest.Server, results []sent) {
	t.Helper()
	noneFailed(t, results)
	checkLedger(t, relay, results)
}

func noneFailed(t *testing.T, results []sent) {
	t.Helper()
	for _, s := range results {
		if s.err != nil {
			t.Errorf("message %d: %v", s.number, s.err)
		}
	}
}

// noRelay is a Dial that fails, and records when it was called.
type noRelay struct {
	mu    sync.Mutex // guards the field below
	times []time.Time
}

func (n *noRelay) Dial(context.Context, string, string) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.times = append(n.times, time.Now())
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
}

func (n *noRelay) dials() []time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.times
}

func (n *noRelay) config() smtprelay.Config {
	return smtprelay.Config{Addr: "relay.example:25", TLS: smtprelay.TLSNone, LocalName: "client.example", Dial: n.Dial}
}

func contains(err error, words string) bool {
	return err != nil && strings.Contains(err.Error(), words)
}

// inChunks makes a relay in memory that offers CHUNKING, without TLS and AUTH.
func inChunks(s *smtptest.Server) {
	s.InMemory, s.Chunking, s.NoTLS, s.NoAuth = true, true, true, true
}

// pieces writes a body in pieces of a given size.
type pieces struct {
	text []byte
	size int
}

func (p pieces) WriteTo(w io.Writer) (total int64, err error) {
	for rest := p.text; len(rest) > 0; {
		n, err := w.Write(rest[:min(p.size, len(rest))])
		if total += int64(n); err != nil {
			return total, err
		}
		rest = rest[n:]
	}
	return total, nil
}

func bubbleClient(t *testing.T, c smtprelay.Config) *smtprelay.Client {
	c.Addr, c.TLS, c.AllowInsecureAuth, c.Chunking = "relay.example:587", smtprelay.TLSNone, true, true
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

const (
	secretUser = "secret-tests-user"
	secretKey  = "SG.k3y-with/odd+chars=.and%percent"
)

// lockedBuffer is a buffer for concurrent writes.
type lockedBuffer struct {
	mu sync.Mutex // guards the field below
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}

// missed is how many recipients, according to err, did not get the message.
func missed(err error) (n int) {
	for _, r := range failure(err).Recipients {
		if r.Outcome != smtprelay.Accepted {
			n++
		}
	}
	return n
}
