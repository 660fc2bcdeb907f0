//go:build unix

package storetest

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/smtptest"
)

// In this file: workers that are killed. Each is the test's binary again, as a process of its own.

var kills = flag.Int("kills", 0, "how often the worker is killed in each way of writing intents; 0: what the store's test says")

// Engine is a store as processes use it.
type Engine struct {
	Open  func(place string) (outbox.Store, error)
	Place func(t *testing.T) string // a new one

	Kills int            // in each way of writing intents, unless the flag -kills says otherwise
	Most  map[string]int // how many messages may be unknown for each kill, on average: with intents "at end" and "early"
}

// Child reports whether one of these tests started the process; if so, Child has done the process's work. TestMain calls it first.
func Child(open func(place string) (outbox.Store, error)) bool {
	place := os.Getenv("OUTBOX_PLACE")
	if place == "" {
		return false
	}
	if err := child(place, os.Getenv("OUTBOX_ADDR"), os.Getenv("OUTBOX_HOW"), open); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

// Process returns the command that runs a Child. With how "at end", "early" or "none" it is a worker that writes intents in this
// way until its input ends; with "enqueue" it enqueues ten messages, and reports each.
func Process(how, place, addr string, wrapper ...string) *exec.Cmd {
	args := append(slices.Clone(wrapper), os.Args[0])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "OUTBOX_PLACE="+place, "OUTBOX_ADDR="+addr, "OUTBOX_HOW="+how)
	cmd.Stderr = os.Stderr
	return cmd
}

// InHand is how many messages a worker of [Kills] sends at once.
const InHand = 40

func child(place, addr, how string, open func(place string) (outbox.Store, error)) error {
	if how == "relay" {
		return beRelay()
	}
	store, err := open(place)
	if err != nil {
		return err
	}
	defer store.Close()
	client, err := smtprelay.New(smtprelay.Config{Addr: addr, TLS: smtprelay.TLSNone})
	if err != nil {
		return err
	}
	defer client.Close()
	cfg := outbox.Config{Store: store, Client: client, InHand: InHand}
	switch how {
	case "early":
		cfg.Intent = outbox.Early
	case "none":
		cfg.Store = careless{store}
	}
	box, err := outbox.New(cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if how == "enqueue" {
		for i := range 10 {
			if err := box.Enqueue(ctx, numbered(i)); err != nil {
				return err
			}
			fmt.Printf("durable %d\n", i)
		}
		return nil
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return box.Run(ctx)
}

// careless is a store that writes no intents down.
type careless struct{ outbox.Store }

func (careless) Begin(_ context.Context, intents []outbox.Intent) []error {
	return make([]error, len(intents))
}

func numbered(i int) outbox.Message {
	return outbox.Message{ID: fmt.Sprint(i), From: "a@x.example", To: []string{fmt.Sprintf("b%d@y.example", i)},
		Body: smtprelay.Bytes(fmt.Appendf(nil, "Subject: %d\r\n\r\n%s", i, strings.Repeat("It is ready.\r\n", 100)))}
}

// Kills tests that a worker which is killed at any moment loses nothing and sends nothing twice; messages in progress are listed.
func Kills(t *testing.T, e Engine) {
	if *kills > 0 {
		e.Kills = *kills
	}
	for how, most := range e.Most {
		t.Run("intents "+how, func(t *testing.T) {
			r := killed(t, how, e.Kills, e)
			t.Logf("%d kills, %d messages: %d twice, %d lost, %d unknown (%.1f for each kill), of which the relay has %d",
				e.Kills, r.messages, r.twice, r.lost, r.unknown, float64(r.unknown)/float64(e.Kills), r.unknownSent)
			if r.twice > 0 || r.lost > 0 {
				t.Errorf("%d twice, %d lost", r.twice, r.lost)
			}
			if r.unknown > most*e.Kills {
				t.Errorf("%d unknown after %d kills, want %d for each at most", r.unknown, e.Kills, most)
			}
		})
	}
	t.Run("without intents some are sent twice", func(t *testing.T) { // so that the others can fail
		r := killed(t, "none", min(e.Kills, 30), e)
		t.Logf("%d kills, %d messages: %d twice", min(e.Kills, 30), r.messages, r.twice)
		if r.twice == 0 {
			t.Errorf("%d messages, and none twice", r.messages)
		}
	})
}

// ledger is what has come of it.
type ledger struct{ messages, twice, lost, unknown, unknownSent int }

// killed has a worker send, and kills it at random moments.
func killed(t *testing.T, how string, kills int, e Engine) (l ledger) {
	place := e.Place(t)
	relay := smtptest.New(t, func(s *smtptest.Server) {
		s.NoTLS, s.NoAuth, s.DropBodies, s.Chunking, s.MaxConns, s.MaxMessages, s.Delay = true, true, true, true, -1, -1, time.Millisecond
	})
	var events atomic.Int64 // until the worker is killed
	var worker atomic.Pointer[os.Process]
	relay.Fault(smtptest.Fault{Count: -1, When: func(smtptest.Event) bool {
		if p := worker.Load(); events.Add(-1) == 0 && p != nil {
			// At once, between two things that it does, or at any moment.
			time.AfterFunc(time.Duration(rand.IntN(2)*rand.IntN(10_000))*time.Microsecond, func() { _ = p.Kill() })
		}
		return false
	}})

	store, err := e.Open(place)
	if err != nil {
		t.Fatal(err)
	}
	box, err := outbox.New(outbox.Config{Store: store, Client: relay.Client(t)})
	if err != nil {
		t.Fatal(err)
	}
	l.messages = 60 * kills
	for id, err := range box.EnqueueAll(t.Context(), func(yield func(outbox.Message) bool) {
		for i := range l.messages {
			if !yield(numbered(i)) {
				return
			}
		}
	}) {
		if err != nil {
			t.Fatal(id, err)
		}
	}
	for range kills {
		cmd := Process(how, place, relay.Addr())
		input, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		events.Store(1 << 40)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		worker.Store(cmd.Process)
		events.Store(1 + rand.Int64N(300))
		if err := cmd.Wait(); err == nil {
			t.Error("the worker has ended by itself")
		}
		_ = input.Close()
	}
	// The last one comes to its end.
	worker.Store(nil)
	cmd := Process(how, place, relay.Addr())
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for some(t, box, outbox.Queued) || some(t, box, outbox.Sending) {
		time.Sleep(20 * time.Millisecond)
	}
	_ = input.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}

	got := map[string]int{}
	for _, m := range relay.Messages() {
		got[m.To[0]]++
	}
	for i := range l.messages {
		n := got[numbered(i).To[0]]
		s, err := box.Status(t.Context(), fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case n > 1:
			l.twice++
		case s.State == outbox.Unknown:
			l.unknown++
			l.unknownSent += n
		case s.State != outbox.Accepted || n == 0:
			l.lost++
		}
	}
	if n := count(t, box, outbox.Unknown); n < l.unknown {
		t.Errorf("%d are listed as unknown, and %d are", n, l.unknown)
	}
	if err := store.Close(); err != nil {
		t.Error(err)
	}
	return l
}

// some reports whether there is a message in a state.
func some(t *testing.T, box *outbox.Outbox, state outbox.State) bool {
	for _, err := range box.List(t.Context(), state) {
		if err != nil {
			t.Fatal(err)
		}
		return true
	}
	return false
}

func count(t *testing.T, box *outbox.Outbox, state outbox.State) (n int) {
	for _, err := range box.List(t.Context(), state) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}
