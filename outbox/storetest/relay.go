package storetest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/smtptest"
)

// In this file: an Outbox on the store, and a relay.

// service is an Outbox that runs.
type service struct {
	*outbox.Outbox
	bed    *bed
	relay  *smtptest.Server
	stop   func() error // ends Run, and returns its error
	mu     sync.Mutex
	ended  []outbox.Item
	change sync.Cond
}

// serve runs an Outbox on the store, which set may change the configuration of.
func (b *bed) serve(relay *smtptest.Server, set ...func(*outbox.Config)) *service {
	b.t.Helper()
	s := &service{bed: b, relay: relay}
	s.change.L = &s.mu
	client := relay.Client(b.t, func(c *smtprelay.Config) { c.Retry.MaxAttempts, c.Retry.MaxBackoff = 2, time.Millisecond })
	cfg := outbox.Config{Store: b.store, Client: client,
		Retry: outbox.Retry{First: time.Millisecond, Most: time.Millisecond}, Ended: s.end}
	for _, f := range set {
		f(&cfg)
	}
	box, err := outbox.New(cfg)
	b.must(err)
	s.Outbox = box
	ctx, cancel := context.WithCancel(b.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- box.Run(ctx) }()
	s.stop = sync.OnceValue(func() error {
		cancel()
		defer client.Close() // the next one needs the relay's connections
		return <-ended
	})
	b.t.Cleanup(func() { b.must(s.stop()) })
	return s
}

func (s *service) end(i outbox.Item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = append(s.ended, i)
	s.change.Broadcast()
}

// wait waits until n deliveries have ended.
func (s *service) wait(n int) []outbox.Item {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.ended) < n {
		s.change.Wait()
	}
	return slices.Clone(s.ended)
}

// count returns how many deliveries have ended.
func (s *service) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ended)
}

// pause lets others do something that nobody tells of.
func pause() { time.Sleep(5 * time.Millisecond) }

func newRelay(t *testing.T) *smtptest.Server {
	return smtptest.New(t, func(s *smtptest.Server) { s.NoTLS, s.NoAuth = true, true })
}

func message(id string) outbox.Message {
	return outbox.Message{ID: id, From: "a@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes([]byte("Subject: " + id + "\r\n\r\nhello\r\n"))}
}

func (s *service) enqueue(messages ...outbox.Message) {
	s.bed.t.Helper()
	for _, m := range messages {
		s.bed.must(s.Enqueue(s.bed.t.Context(), m))
	}
}

func sent(t *testing.T, b *bed) {
	for _, intent := range []outbox.IntentTime{outbox.Early, outbox.AtEnd} {
		s := b.serve(newRelay(t), func(c *outbox.Config) { c.Intent = intent })
		for id, err := range s.EnqueueAll(t.Context(), func(yield func(outbox.Message) bool) {
			for i := range 200 {
				if !yield(message(fmt.Sprintf("%d-%d", intent, i))) {
					return
				}
			}
			yield(outbox.Message{ID: "without recipients"})
		}) {
			if (err != nil) != (id == "without recipients") {
				t.Errorf("%s: %v", id, err)
			}
		}
		s.wait(200)
		if stats := s.relay.Stats(); stats.Accepted != 200 || stats.Duplicates != 0 {
			t.Errorf("%d accepted, %d twice", stats.Accepted, stats.Duplicates)
		}
		b.must(s.stop())
	}
	if n := len(b.listed(outbox.Accepted)); n != 400 {
		t.Errorf("%d accepted in the store, want 400", n)
	}
}

func refused(t *testing.T, b *bed) {
	relay := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "gone@y.example", Reply: "550 5.1.1 no such user", Count: -1})
	s := b.serve(relay)
	some, all := message("some"), message("all")
	some.To, all.To = []string{"b@y.example", "gone@y.example"}, []string{"gone@y.example"}
	s.enqueue(some, all)
	s.wait(2)
	i := b.want("some", outbox.Dead)
	if !slices.Equal(i.To, []string{"gone@y.example"}) || !strings.Contains(i.Reason, "no such user") || i.Attempts != 1 ||
		len(i.Fates) != 2 || i.Fates[0].Outcome != smtprelay.Accepted || i.Fates[1].Code != 550 || i.Fates[1].Reply != `550 5.1.1 "no such user"` {
		t.Errorf("got %+v", i)
	}
	b.want("all", outbox.Dead)
	if s, err := s.Stats(t.Context()); err != nil || s.Stored != (outbox.Counts{Dead: 2}) || s.Ended != (outbox.Ended{Dead: 2}) {
		t.Errorf("counted %+v, %v", s, err)
	}
	if n := relay.Stats().Accepted; n != 1 {
		t.Errorf("%d accepted, want 1", n)
	}
	// A person has mended it.
	b.must(s.Resolve(t.Context(), "some", outbox.TakeAsSent), s.Resolve(t.Context(), "all", outbox.Drop))
	b.want("some", outbox.Accepted)
	b.want("all", outbox.Cancelled)
	isConflict(t, "a verdict on what is neither", s.Resolve(t.Context(), "some", outbox.SendAgain))
}

func later(t *testing.T, b *bed) {
	relay := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "grey@y.example", Reply: "451 4.7.1 greylisted", Count: 2})
	s := b.serve(relay)
	m := message("one")
	m.To = []string{"b@y.example", "grey@y.example"}
	s.enqueue(m)
	ended := s.wait(3)
	if ended[0].State != outbox.Queued || !slices.Equal(ended[0].To, []string{"grey@y.example"}) || ended[2].State != outbox.Accepted || ended[2].Attempts != 3 {
		t.Errorf("the deliveries: %+v", ended)
	}
	var to []string
	for _, m := range relay.Messages() {
		to = append(to, m.To...)
	}
	if !slices.Equal(to, []string{"b@y.example", "grey@y.example"}) {
		t.Errorf("sent to %v", to)
	}
}

func byDomain(t *testing.T, b *bed) {
	relay := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "451 4.7.1 not now", Count: 2})
	s := b.serve(relay, func(c *outbox.Config) {
		c.RetryFor = func(i outbox.Item) outbox.Retry {
			if strings.HasSuffix(i.To[0], "@slow.example") {
				return outbox.Retry{First: time.Hour}
			}
			return outbox.Retry{} // that of Retry
		}
	})
	fast, slow := message("fast"), message("slow")
	slow.To = []string{"b@slow.example"}
	s.enqueue(fast, slow)
	s.wait(3)
	b.want("fast", outbox.Accepted)
	if i := b.want("slow", outbox.Queued); time.Until(i.Due) < 40*time.Minute {
		t.Errorf("slow is tried again at %v", i.Due)
	}
}

func givenUp(t *testing.T, b *bed) {
	relay := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: "451 4.3.0 not now", Count: -1})
	s := b.serve(relay, func(c *outbox.Config) {
		c.Retry = outbox.Retry{First: time.Millisecond, Most: time.Millisecond, For: time.Nanosecond}
	})
	s.enqueue(message("one"))
	s.wait(1)
	if i := b.want("one", outbox.Dead); !strings.HasPrefix(i.Reason, "given up after 1 attempts: ") || !strings.Contains(i.Reason, "not now") {
		t.Errorf("because: %s", i.Reason)
	}
}

func times(t *testing.T, b *bed) {
	s := b.serve(newRelay(t))
	soon, never, late := message("soon"), message("never"), message("late")
	soon.NotBefore, never.NotBefore, late.NotAfter = time.Now().Add(50*time.Millisecond), time.Now().Add(time.Hour), time.Now().Add(-time.Second)
	s.enqueue(soon, never, late)
	for _, i := range s.wait(2) {
		if i.ID == "soon" && i.Changed.Before(soon.NotBefore) {
			t.Error("it was sent before its time")
		}
	}
	b.want("soon", outbox.Accepted)
	b.want("never", outbox.Queued)
	if i := b.want("late", outbox.Dead); !i.Changed.After(i.Created) {
		t.Errorf("it is dead since %v, and was enqueued at %v", i.Changed, i.Created)
	}
	b.must(s.stop())
	b.reopen() // schedules hold across a restart
	again := b.serve(s.relay)
	again.enqueue(message("now"))
	again.wait(1)
	b.want("never", outbox.Queued)
}

func cancelled(t *testing.T, b *bed) {
	s := b.serve(newRelay(t))
	m := message("one")
	m.NotBefore = time.Now().Add(time.Hour)
	s.enqueue(m)
	for _, want := range []bool{true, false} {
		if ok, err := s.Cancel(t.Context(), "one"); ok != want || err != nil {
			t.Errorf("cancelled: %t, %v; want %t", ok, err, want)
		}
	}
	if _, err := s.Cancel(t.Context(), "none"); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	// Cancel races the intent: whoever is first wins, and both agree.
	var cancelled int
	for i := range 200 {
		id := fmt.Sprintf("race%d", i)
		s.enqueue(message(id))
		ok, err := s.Cancel(t.Context(), id)
		b.must(err)
		if ok {
			cancelled++
		}
	}
	s.wait(200 - cancelled)
	b.must(s.stop())
	if n := s.relay.Stats().Accepted; n != 200-cancelled || len(b.listed(outbox.Cancelled)) != cancelled+1 {
		t.Errorf("%d were cancelled, and the relay has %d of 200", cancelled, n)
	}
}

func unknown(t *testing.T, b *bed) {
	relay := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Drop: true, Count: 2}) // the relay goes where its reply is due
	s := b.serve(relay)
	s.enqueue(message("one"), message("two"))
	s.wait(2)
	if i := b.want("one", outbox.Unknown); !slices.Equal(i.To, []string{"b@y.example"}) || i.Reason == "" {
		t.Errorf("got %+v", i)
	}
	s.enqueue(message("one")) // the same ID
	b.must(s.stop())
	b.reopen()
	s = b.serve(relay)
	s.enqueue(message("three"))
	s.wait(1)
	b.want("one", outbox.Unknown)
	b.must(s.Resolve(t.Context(), "one", outbox.SendAgain))
	s.wait(2)
	b.want("one", outbox.Accepted)
	b.want("two", outbox.Unknown)
}

func requeued(t *testing.T, b *bed) {
	relay := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "full@y.example", Reply: "550 5.2.1 mailbox disabled"}) // once
	s := b.serve(relay)
	dead := message("dead")
	dead.To = []string{"b@y.example", "full@y.example"}
	s.enqueue(dead)
	s.wait(1)
	b.want("dead", outbox.Dead)
	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Drop: true}) // once
	s.enqueue(message("unknown"))
	s.wait(2)
	isConflict(t, "Requeue of what is unknown", s.Requeue(t.Context(), "unknown"))
	b.want("unknown", outbox.Unknown)
	b.must(s.Requeue(t.Context(), "dead"))
	s.wait(3)
	b.want("dead", outbox.Accepted)
	isConflict(t, "Requeue of what was accepted", s.Requeue(t.Context(), "dead"))
	var to []string
	for _, m := range relay.Messages() {
		to = append(to, m.To...)
	}
	if slices.Sort(to); !slices.Equal(to, []string{"b@y.example", "full@y.example"}) {
		t.Errorf("the relay has them for %v", to)
	}
	if err := s.Requeue(t.Context(), "none"); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func graceful(t *testing.T, b *bed) {
	for _, intent := range []outbox.IntentTime{outbox.Early, outbox.AtEnd} {
		relay := newRelay(t)
		s := b.serve(relay, func(c *outbox.Config) { c.Intent = intent })
		for i := range 500 {
			s.enqueue(message(fmt.Sprintf("%d-%d", intent, i)))
		}
		s.wait(50)
		b.must(s.stop()) // in the middle of it
		accepted, queued := len(b.listed(outbox.Accepted)), len(b.listed(outbox.Queued))
		if got := relay.Stats().Accepted; got != accepted || accepted+queued != 500 {
			t.Errorf("%v: the relay has %d; accepted %d, queued %d, sending %v, unknown %v, dead %v", intent, got, accepted, queued,
				b.listed(outbox.Sending), b.listed(outbox.Unknown), b.listed(outbox.Dead))
		}
		s = b.serve(relay, func(c *outbox.Config) { c.Intent = intent })
		s.wait(queued)
		b.must(s.stop())
		if stats := relay.Stats(); stats.Accepted != 500 || stats.Duplicates != 0 {
			t.Errorf("%v: in the end the relay has %d, %d twice", intent, stats.Accepted, stats.Duplicates)
		}
		_, err := b.store.Forget(t.Context(), time.Now().Add(time.Hour))
		b.must(err)
	}
}

func outage(t *testing.T, b *bed) {
	relay := newRelay(t)
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 not now", Drop: true, Count: -1})
	s := b.serve(relay)
	for i := range 10 {
		s.enqueue(message(fmt.Sprint(i)))
	}
	for len(relay.Conns()) == 0 {
		time.Sleep(time.Millisecond)
	}
	b.must(s.stop())
	if n := len(b.listed(outbox.Queued)); n != 10 {
		t.Errorf("%d queued, want 10", n)
	}
}

// counting is a store that counts intents.
type counting struct {
	outbox.Store
	intents atomic.Int32
}

func (c *counting) Begin(ctx context.Context, intents []outbox.Intent) []error {
	c.intents.Add(int32(len(intents)))
	return c.Store.Begin(ctx, intents)
}

func fewAhead(t *testing.T, b *bed) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // no message gets so far that it needs its intent
	b.must(err)
	defer silent.Close()
	client, err := smtprelay.New(smtprelay.Config{Addr: silent.Addr().String(), TLS: smtprelay.TLSNone})
	b.must(err)
	defer client.Close()
	c := &counting{Store: b.store}
	s := b.serve(newRelay(t), func(cfg *outbox.Config) { cfg.Store, cfg.Client, cfg.Intent, cfg.InHand = c, client, outbox.Early, 40 })
	for i := range 60 {
		s.enqueue(message(fmt.Sprint(i)))
	}
	for inHand := 0; inHand < 40; time.Sleep(time.Millisecond) {
		stats, err := s.Stats(t.Context())
		b.must(err)
		inHand = stats.InHand
	}
	b.must(s.stop())
	if n := c.intents.Load(); n != 10 {
		t.Errorf("%d intents were begun, want 10: a quarter of InHand", n)
	}
	if n := len(b.listed(outbox.Queued)); n != 60 {
		t.Errorf("%d queued, want 60", n)
	}
}

// unwilling is a store that writes no intents down.
type unwilling struct {
	outbox.Store
	asked chan struct{}
}

var errFull = errors.New("no space left on device")

func (u *unwilling) Begin(_ context.Context, intents []outbox.Intent) []error {
	select {
	case u.asked <- struct{}{}:
	default:
	}
	return slices.Repeat([]error{errFull}, len(intents))
}

func noIntent(t *testing.T, b *bed) {
	relay := newRelay(t)
	u := &unwilling{Store: b.store, asked: make(chan struct{}, 1)}
	s := b.serve(relay, func(c *outbox.Config) { c.Store = u })
	s.enqueue(message("one"))
	<-u.asked
	s.wait(1)
	b.must(s.stop())
	if i := b.want("one", outbox.Queued); relay.Stats().Accepted != 0 || i.Attempts != 0 {
		t.Errorf("the relay has %d, after %d attempts", relay.Stats().Accepted, i.Attempts)
	}
}
