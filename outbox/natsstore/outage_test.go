//go:build unix

// Here belongs what happens while servers are away, and to a worker that is paused for longer than its lease.
package natsstore_test

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/storetest"
	"github.com/smtprelay/smtprelay/smtptest"
)

func newRelay(t *testing.T) *smtptest.Server {
	return smtptest.New(t, func(s *smtptest.Server) {
		s.NoTLS, s.NoAuth, s.MaxConns, s.MaxMessages, s.Delay = true, true, -1, -1, 5*time.Millisecond
	})
}

func enqueue(t *testing.T, box *outbox.Outbox, n int) {
	t.Helper()
	for id, err := range box.EnqueueAll(t.Context(), func(yield func(outbox.Message) bool) {
		for i := range n {
			if !yield(outbox.Message{ID: fmt.Sprint(i), From: "a@x.example", To: []string{fmt.Sprintf("b%d@y.example", i)}, Body: smtprelay.Bytes([]byte("Subject: hello\r\n\r\nhello\r\n"))}) {
				return
			}
		}
	}) {
		if err != nil {
			t.Fatal(id, err)
		}
	}
}

func counts(t *testing.T, box *outbox.Outbox) outbox.Counts {
	t.Helper()
	s, err := box.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.Stored
}

func TestWhileTheServerIsAwayNothingIsSentAndThenAllIsOnce(t *testing.T) {
	const messages = 300
	relay := newRelay(t)
	config := embedded.Config{Dir: t.TempDir(), Listen: "127.0.0.1:0"}
	first, err := embedded.Start(config)
	if err != nil {
		t.Fatal(err)
	}
	url := first.URL()
	config.Listen = strings.TrimPrefix(url, "nats://")
	nc, err := natsstore.Connect(url)
	store, err := open(nc, err, natsstore.Options{Lease: time.Second})
	if err != nil {
		first.Close()
		t.Fatal(err)
	}
	defer store.Close()
	box, err := outbox.New(outbox.Config{Store: store, Client: relay.Client(t), InHand: storetest.InHand})
	if err != nil {
		t.Fatal(err)
	}
	enqueue(t, box, messages)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- box.Run(ctx) }()
	if err := relay.Wait(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	first.Close()
	for got := -1; got != relay.Stats().Accepted; time.Sleep(100 * time.Millisecond) { // what had an intent has come to its end
		got = relay.Stats().Accepted
	}
	had := relay.Stats().Accepted
	if had == messages {
		t.Error("nothing was left to be sent")
	}
	short, stop := context.WithTimeout(t.Context(), 100*time.Millisecond)
	if err := box.Enqueue(short, outbox.Message{ID: "x", To: []string{"b@y.example"}, Body: smtprelay.Bytes(nil)}); err == nil {
		t.Error("a message is durable while nobody is there who could have it")
	}
	stop()
	if n := relay.Stats().Accepted; n != had {
		t.Errorf("the relay has %d, and had %d when the server was gone", n, had)
	}
	start(t, config)
	for c := counts(t, box); c.Queued+c.Sending > 0; c = counts(t, box) {
		time.Sleep(20 * time.Millisecond)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if s := relay.Stats(); s.Accepted < messages || s.Duplicates > 0 || counts(t, box) != (outbox.Counts{}) {
		t.Errorf("the relay has %d of %d, %d twice; left: %+v", s.Accepted, messages, s.Duplicates, counts(t, box))
	}
}

// A worker that is paused goes on as if nothing had happened: it must not send what others have taken.
func TestPausedWorkerSendsNothingTwice(t *testing.T) {
	const messages = 400
	relay := newRelay(t)
	place := place(start(t, embedded.Config{Dir: t.TempDir(), Listen: "127.0.0.1:0"}).URL())
	store, err := openPlace(place)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	box, err := outbox.New(outbox.Config{Store: store, Client: relay.Client(t)})
	if err != nil {
		t.Fatal(err)
	}
	enqueue(t, box, messages)
	worker := func() (*exec.Cmd, io.Closer) {
		cmd := storetest.Process("at end", place, relay.Addr())
		input, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, input
	}
	paused, pausedInput := worker()
	if err := relay.Wait(t.Context(), 50); err != nil {
		t.Fatal(err)
	}
	if err := paused.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	other, otherInput := worker()
	for c := counts(t, box); c.Queued+c.Sending > 0; c = counts(t, box) {
		time.Sleep(20 * time.Millisecond)
	}
	if err := paused.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	_ = pausedInput.Close()
	_ = otherInput.Close()
	for _, cmd := range []*exec.Cmd{paused, other} {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	got := map[string]int{}
	for _, m := range relay.Messages() {
		got[m.To[0]]++
	}
	unknown := 0
	for i := range messages {
		s, err := box.Status(t.Context(), fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		n := got[fmt.Sprintf("b%d@y.example", i)]
		if s.State == outbox.Unknown {
			unknown++
		}
		if n > 1 || s.State != outbox.Unknown && (n != 1 || s.State != outbox.Accepted) {
			t.Errorf("message %d: the relay has it %d times, and it is %v", i, n, s.State)
		}
	}
	t.Logf("%d unknown", unknown)
	if unknown > storetest.InHand {
		t.Errorf("%d unknown, want %d at most", unknown, storetest.InHand)
	}
}
