//go:build unix

// Here belongs what needs a worker that is killed. It is this test's binary again, as a process of its own.
package sqlitestore_test

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/sqlitestore"
	"github.com/smtprelay/smtprelay/smtptest"
)

var kills = flag.Int("kills", 30, "how often the worker is killed in each way of writing intents")

func TestMain(m *testing.M) {
	if dir := os.Getenv("OUTBOX_DIR"); dir != "" {
		if err := child(dir, os.Getenv("OUTBOX_ADDR"), os.Getenv("OUTBOX_HOW")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// inHand is how many messages the worker sends at once.
const inHand = 40

// child is what the process does: it enqueues ten messages and says so, or is the worker until its input ends.
func child(dir, addr, how string) error {
	store, err := sqlitestore.Open(dir)
	if err != nil {
		return err
	}
	defer store.Close()
	client, err := smtprelay.New(smtprelay.Config{Addr: addr, TLS: smtprelay.TLSNone})
	if err != nil {
		return err
	}
	defer client.Close()
	cfg := outbox.Config{Store: store, Client: client, InHand: inHand}
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
			if err := box.Enqueue(ctx, message(i)); err != nil {
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

func message(i int) outbox.Message {
	return outbox.Message{ID: fmt.Sprint(i), From: "a@x.example", To: []string{fmt.Sprintf("b%d@y.example", i)},
		Body: smtprelay.Bytes(fmt.Appendf(nil, "Subject: %d\r\n\r\n%s", i, strings.Repeat("It is ready.\r\n", 100)))}
}

func process(how, dir, addr string, wrapper ...string) *exec.Cmd {
	args := append(slices.Clone(wrapper), os.Args[0])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "OUTBOX_DIR="+dir, "OUTBOX_ADDR="+addr, "OUTBOX_HOW="+how)
	cmd.Stderr = os.Stderr
	return cmd
}

// A worker that is killed at any moment loses nothing and sends nothing twice; what was under way is listed.
func TestKilledWorkerLosesNothingAndSendsNothingTwice(t *testing.T) {
	for how, most := range map[string]int{"at end": 8, "early": inHand} { // unknown for each kill, on average
		t.Run(how, func(t *testing.T) {
			r := killed(t, how, *kills)
			t.Logf("%d kills, %d messages: %d twice, %d lost, %d unknown (%.1f for each kill), of which the relay has %d",
				*kills, r.messages, r.twice, r.lost, r.unknown, float64(r.unknown)/float64(*kills), r.unknownSent)
			if r.twice > 0 || r.lost > 0 {
				t.Errorf("%d twice, %d lost", r.twice, r.lost)
			}
			if r.unknown > most**kills {
				t.Errorf("%d unknown after %d kills, want %d for each at most", r.unknown, *kills, most)
			}
		})
	}
}

// The same without intents: so the test above can fail.
func TestKilledWorkerSendsTwiceWithoutIntents(t *testing.T) {
	if r := killed(t, "none", min(*kills, 30)); r.twice == 0 {
		t.Errorf("%d messages, and none twice", r.messages)
	}
}

// ledger is what has come of it.
type ledger struct{ messages, twice, lost, unknown, unknownSent int }

// killed has a worker send, and kills it at random moments.
func killed(t *testing.T, how string, kills int) (l ledger) {
	dir := t.TempDir()
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

	store, err := sqlitestore.Open(dir)
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
			if !yield(message(i)) {
				return
			}
		}
	}) {
		if err != nil {
			t.Fatal(id, err)
		}
	}
	for range kills {
		cmd := process(how, dir, relay.Addr())
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
	cmd := process(how, dir, relay.Addr())
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
		n := got[message(i).To[0]]
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

// What Enqueue has said is durable was synced before it said so: strace sees both.
func TestEnqueueReturnsBehindAnFsync(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Log("strace is not installed: nothing was looked at")
		return
	}
	cmd := process("enqueue", t.TempDir(), "127.0.0.1:25", strace, "-f", "-e", "trace=fsync,fdatasync,write", "-o", "/dev/stdout")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	sync, said := regexp.MustCompile(`(fsync|fdatasync)(\(| resumed).*= 0`), regexp.MustCompile(`write\(1, "durable `)
	syncs, durable := 0, 0
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	for lines.Scan() {
		switch line := lines.Text(); {
		case sync.MatchString(line):
			syncs++
		case said.MatchString(line):
			if durable++; syncs == 0 {
				t.Errorf("Enqueue %d has returned, and nothing was synced", durable)
			}
			syncs = 0
		}
	}
	if durable != 10 {
		t.Errorf("%d of 10 were seen", durable)
	}
}
