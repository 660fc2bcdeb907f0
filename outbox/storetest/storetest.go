// Package storetest has the tests that an [outbox.Store] must pass: tests of the store by itself, of an Outbox on it with a relay,
// and of workers that are killed. The flag -kills sets how often; make kills does it a thousand times.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
)

// Workers is how many workers a store may have at once.
type Workers int

const (
	One  Workers = iota // a second one gets ErrWorking
	Many                // they share the messages
)

// Run runs all tests. open opens the store in a directory, possibly one that was open before; the test closes it.
func Run(t *testing.T, workers Workers, open func(t *testing.T, dir string) outbox.Store) {
	tests := map[string]func(*testing.T, *bed){
		"the same ID again adds nothing":                          sameID,
		"what was put is there after the store was closed":        survives,
		"intents are compare-and-set, by nonce":                   intents,
		"ends are compare-and-set, by nonce":                      ends,
		"what a worker left under way is unknown":                 parked,
		"a message is claimed once":                               claimedOnce,
		"what is due later keeps nothing up":                      deferred,
		"priorities hold within a tenant":                         priorities,
		"tenants take turns by weight":                            tenants,
		"a turn may be longer than a claim":                       longTurns,
		"a change excludes an intent":                             change,
		"what has ended is forgotten":                             forget,
		"bodies of any size":                                      bodies,
		"a body can be read by its ID":                            bodyByID,
		"messages are counted":                                    counted,
		"a list is in pages":                                      list,
		"what is enqueued is sent":                                sent,
		"the relay's no is for good, and its words are kept":      refused,
		"a no for now is tried again, for those who had it":       later,
		"it is tried again as is said for the domain":             byDomain,
		"it is given up in the end":                               givenUp,
		"nothing is sent before its time or after it":             times,
		"what is cancelled is not sent":                           cancelled,
		"unknown is sent again by Resolve alone":                  unknown,
		"what is dead is sent again by Requeue, and nothing else": requeued,
		"a graceful stop leaves nothing unknown":                  graceful,
		"a stop in an outage leaves all queued":                   outage,
		"an intent that cannot be written keeps the message back": noIntent,
		"few intents are begun ahead of the connections":          fewAhead,
	}
	switch workers {
	case One:
		tests["there is one worker"] = oneWorker
	case Many:
		tests["workers share the messages"] = manyWorkers
		tests["what a worker left under way is unknown to the others"] = parkedByOthers
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			b := &bed{t: t, dir: t.TempDir(), open: open}
			b.reopen()
			t.Cleanup(func() { b.close() })
			test(t, b)
		})
	}
}

// bed is a store under test.
type bed struct {
	t     *testing.T
	dir   string
	open  func(*testing.T, string) outbox.Store
	store outbox.Store

	detach func() error // nil: we are no worker
}

func (b *bed) reopen() {
	b.t.Helper()
	b.close()
	b.store = b.open(b.t, b.dir)
}

func (b *bed) close() {
	b.t.Helper()
	if b.detach != nil {
		b.must(b.detach())
		b.detach = nil
	}
	if b.store != nil {
		b.must(b.store.Close())
		b.store = nil
	}
}

// attach makes us a worker, and returns how many messages were parked.
func (b *bed) attach() (parked int) {
	b.t.Helper()
	detach, parked, err := b.store.Attach(b.t.Context())
	b.must(err)
	b.detach = detach
	return parked
}

func (b *bed) must(errs ...error) {
	b.t.Helper()
	for _, err := range errs {
		if err != nil {
			b.t.Fatal(err)
		}
	}
}

func entry(id string, set ...func(*outbox.Item)) outbox.Entry {
	now := time.Now()
	e := outbox.Entry{Item: outbox.Item{ID: id, From: "a@x.example", To: []string{"b@y.example"}, Created: now, Due: now, Changed: now},
		Body: smtprelay.Bytes([]byte("Subject: " + id + "\r\n\r\nhello\r\n"))}
	for _, f := range set {
		f(&e.Item)
	}
	return e
}

func (b *bed) put(entries ...outbox.Entry) {
	b.t.Helper()
	b.must(b.store.Put(b.t.Context(), entries)...)
}

func one(string) int { return 1 }

// claim claims up to n messages.
func (b *bed) claim(n int, weight func(string) int) []outbox.Claim {
	b.t.Helper()
	if b.detach == nil {
		b.attach()
	}
	claims, _, err := b.store.Claim(b.t.Context(), time.Now(), n, weight)
	b.must(err)
	return claims
}

func ids(claims []outbox.Claim) (ids []string) {
	for _, c := range claims {
		ids = append(ids, c.ID)
	}
	return ids
}

func (b *bed) want(id string, state outbox.State) outbox.Item {
	b.t.Helper()
	i, err := b.store.Get(b.t.Context(), id)
	b.must(err)
	if i.State != state {
		b.t.Errorf("%s is %v, want %v (%s)", id, i.State, state, i.Reason)
	}
	return i
}

func (b *bed) listed(state outbox.State) (ids []string) {
	b.t.Helper()
	for i, err := range b.store.List(b.t.Context(), state) {
		b.must(err)
		ids = append(ids, i.ID)
	}
	return ids
}

func (b *bed) begin(c outbox.Claim) error {
	return b.store.Begin(b.t.Context(), []outbox.Intent{{ID: c.ID, Nonce: c.Nonce}})[0]
}

func (b *bed) end(c outbox.Claim, state outbox.State) error {
	c.State, c.Changed = state, time.Now()
	return b.store.End(b.t.Context(), []outbox.End{{Nonce: c.Nonce, Item: c.Item}})[0]
}

func isConflict(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, outbox.ErrConflict) {
		t.Errorf("%s: %v, want ErrConflict", what, err)
	}
}

func sameID(t *testing.T, b *bed) {
	b.put(entry("one"), entry("one", func(i *outbox.Item) { i.From = "c@x.example" }))
	b.put(entry("one"))
	if got := b.listed(outbox.Queued); !slices.Equal(got, []string{"one"}) {
		t.Errorf("queued: %v", got)
	}
	if i := b.want("one", outbox.Queued); i.From != "a@x.example" {
		t.Errorf("the second one has taken the place of the first")
	}
	c := b.claim(1, one)[0]
	b.must(b.begin(c), b.end(c, outbox.Accepted))
	b.put(entry("one"))
	b.want("one", outbox.Accepted)
	if _, err := b.store.Get(t.Context(), "two"); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func survives(t *testing.T, b *bed) {
	since := time.Unix(1_700_000_000, 0).UTC()
	whole := entry("one", func(i *outbox.Item) {
		i.Tenant, i.Priority, i.AllOrNothing, i.NotAfter = "shop", 3, true, since.Add(1e9*3600*24*36500)
		i.MailOptions = &smtprelay.MailOptions{EnvelopeID: "e1", Return: smtprelay.DSNReturnHeaders}
		i.RcptOptions = map[string]*smtprelay.RcptOptions{"b@y.example": {Notify: []smtprelay.DSNNotify{smtprelay.DSNNotifyNever}, RequireRecipientValidSince: since}}
	})
	b.put(whole)
	b.reopen()
	got := b.want("one", outbox.Queued)
	if got.Tenant != "shop" || got.Priority != 3 || !got.AllOrNothing || !got.NotAfter.Equal(whole.NotAfter) || *got.MailOptions != *whole.MailOptions ||
		!slices.Equal(got.RcptOptions["b@y.example"].Notify, whole.RcptOptions["b@y.example"].Notify) || !got.RcptOptions["b@y.example"].RequireRecipientValidSince.Equal(since) {
		t.Errorf("got %+v, want %+v", got, whole.Item)
	}
	c := b.claim(1, one)[0]
	var body strings.Builder
	if _, err := c.Body.WriteTo(&body); err != nil || body.String() != "Subject: one\r\n\r\nhello\r\n" {
		t.Errorf("the body is %q, %v", body.String(), err)
	}
}

func intents(t *testing.T, b *bed) {
	b.put(entry("one"))
	c := b.claim(1, one)[0]
	b.must(b.begin(c), b.begin(c)) // the second transaction of one delivery
	other := c
	other.Nonce = "another delivery"
	isConflict(t, "another delivery's intent", b.begin(other))
	isConflict(t, "an intent for nothing", b.begin(outbox.Claim{Item: outbox.Item{ID: "none"}, Nonce: "x"}))
	b.want("one", outbox.Sending)
	b.must(b.end(c, outbox.Accepted))
	isConflict(t, "an intent for what was accepted", b.begin(c))
}

func ends(t *testing.T, b *bed) {
	b.put(entry("one"), entry("two"))
	claims := b.claim(2, one)
	c, untouched := claims[0], claims[1]
	b.must(b.begin(c))
	other := c
	other.Nonce = "another delivery"
	isConflict(t, "another delivery's end", b.end(other, outbox.Accepted))
	b.want("one", outbox.Sending)
	b.must(b.end(c, outbox.Unknown))
	isConflict(t, "a second end", b.end(c, outbox.Accepted))
	b.must(b.end(untouched, outbox.Dead)) // without an intent
	b.want("two", outbox.Dead)
	if got := b.claim(9, one); len(got) > 0 {
		t.Errorf("claimed %v, want nothing", ids(got))
	}
}

func parked(t *testing.T, b *bed) {
	b.put(entry("begun"), entry("claimed"), entry("queued"))
	claims := b.claim(2, one)
	b.must(b.begin(claims[0]))
	b.reopen() // as after a crash: claims are not durable
	if n := b.attach(); n != 1 {
		t.Errorf("%d parked, want 1", n)
	}
	b.want("begun", outbox.Unknown)
	if got := ids(b.claim(9, one)); !slices.Equal(got, []string{"claimed", "queued"}) {
		t.Errorf("claimed %v", got)
	}
	isConflict(t, "the end of the one that died", b.end(claims[0], outbox.Accepted))
}

func oneWorker(t *testing.T, b *bed) {
	detach, _, err := b.store.Attach(t.Context())
	b.must(err)
	other := b.open(t, b.dir)
	defer other.Close()
	if _, _, err := other.Attach(t.Context()); !errors.Is(err, outbox.ErrWorking) {
		t.Errorf("the second worker: %v, want ErrWorking", err)
	}
	b.must(other.Put(t.Context(), []outbox.Entry{entry("from another process")})...)
	b.want("from another process", outbox.Queued)
	b.must(detach())
	again, _, err := other.Attach(t.Context())
	b.must(err, again())
}

func manyWorkers(t *testing.T, b *bed) {
	const messages = 400
	relay := newRelay(t)
	other := &bed{t: t, dir: b.dir, open: b.open}
	other.reopen()
	defer other.close()
	one, two := b.serve(relay), other.serve(relay)
	for one.count() < 20 || two.count() < 20 { // both have their share
		one.enqueue(message(fmt.Sprintf("before%d", one.count()+two.count())))
	}
	for i := range messages {
		one.enqueue(message(fmt.Sprint(i)))
	}
	b.must(one.stop()) // the other one takes what is left
	for len(b.listed(outbox.Queued))+len(b.listed(outbox.Sending)) > 0 {
		pause()
	}
	b.must(two.stop())
	if stats := relay.Stats(); stats.Duplicates != 0 || stats.Accepted != len(b.listed(outbox.Accepted)) || stats.Accepted < messages {
		t.Errorf("%d accepted, %d twice; %d in the store, %d unknown", stats.Accepted, stats.Duplicates, len(b.listed(outbox.Accepted)), len(b.listed(outbox.Unknown)))
	}
}

func parkedByOthers(t *testing.T, b *bed) {
	for i := range 20 {
		b.put(entry(fmt.Sprint(i)))
	}
	for _, c := range b.claim(20, one) {
		b.must(b.begin(c))
	}
	other := &bed{t: t, dir: b.dir, open: b.open}
	other.reopen()
	defer other.close()
	if n := other.attach(); n != 0 {
		t.Errorf("%d were parked that a worker has in hand", n)
	}
	b.must(b.detach())
	b.detach = nil
	for len(other.listed(outbox.Unknown)) < 20 {
		pause()
	}
}

func claimedOnce(t *testing.T, b *bed) {
	for i := range 10 {
		b.put(entry(fmt.Sprint(i)))
	}
	first, second := b.claim(4, one), b.claim(99, one)
	if len(first) != 4 || len(second) != 6 {
		t.Errorf("claimed %v and %v", ids(first), ids(second))
	}
	b.store.Release(ids(first)...)
	if again := b.claim(99, one); len(again) != 4 || again[0].Nonce == first[0].Nonce {
		t.Errorf("claimed %v after a release, the nonce the same: %t", ids(again), again[0].Nonce == first[0].Nonce)
	}
}

func deferred(t *testing.T, b *bed) {
	var entries []outbox.Entry
	for i := range 1000 {
		entries = append(entries, entry(fmt.Sprintf("later%d", i), func(i *outbox.Item) { i.Due, i.Priority = i.Due.Add(time.Hour), 9 }))
	}
	soon := time.Now().Add(time.Minute)
	b.put(append(entries, entry("now"), entry("soon", func(i *outbox.Item) { i.Due = soon }))...)
	b.attach()
	claims, next, err := b.store.Claim(t.Context(), time.Now(), 10, one)
	b.must(err)
	if got := ids(claims); !slices.Equal(got, []string{"now"}) || !next.Equal(soon) {
		t.Errorf("claimed %v, the next at %v; want now, and %v", got, next, soon)
	}
	if claims, _, err = b.store.Claim(t.Context(), soon, 10, one); err != nil || len(claims) != 1 || claims[0].ID != "soon" {
		t.Errorf("claimed %v, %v; want soon", ids(claims), err)
	}
	if claims, _, err = b.store.Claim(t.Context(), soon.Add(2*time.Hour), 2000, one); err != nil || len(claims) != 1000 {
		t.Errorf("claimed %d in the end, %v; want 1000", len(claims), err)
	}
	if n := len(b.listed(outbox.Queued)); n != 1002 {
		t.Errorf("%d queued, want 1002", n)
	}
}

func priorities(t *testing.T, b *bed) {
	for i, p := range []int{0, 5, -1, 5} {
		b.put(entry(fmt.Sprint(i), func(i *outbox.Item) { i.Priority = p }))
	}
	if got := ids(b.claim(9, one)); !slices.Equal(got, []string{"1", "3", "0", "2"}) {
		t.Errorf("claimed %v", got)
	}
}

func tenants(t *testing.T, b *bed) {
	for i := range 300 {
		b.put(entry(fmt.Sprintf("big%d", i), func(i *outbox.Item) { i.Tenant = "big" }))
	}
	for i := range 10 {
		b.put(entry(fmt.Sprintf("small%d", i), func(i *outbox.Item) { i.Tenant = "small" }), entry(fmt.Sprintf("none%d", i)))
	}
	count := map[string]int{}
	for range 10 {
		for _, c := range b.claim(4, func(tenant string) int { return map[string]int{"big": 2}[tenant] + 1 }) {
			count[c.Tenant]++
		}
	}
	if count["small"] < 7 || count[""] < 7 || count["big"] < 20 {
		t.Errorf("of 40 claims: %v; want about 24, 8 and 8", count)
	}
}

func longTurns(t *testing.T, b *bed) {
	for i := range 60 {
		b.put(entry(fmt.Sprintf("big%d", i), func(i *outbox.Item) { i.Tenant = "big" }), entry(fmt.Sprintf("small%d", i), func(i *outbox.Item) { i.Tenant = "small" }))
	}
	count := map[string]int{}
	for range 13 {
		for _, c := range b.claim(4, func(tenant string) int { return map[string]int{"big": 11}[tenant] + 1 }) {
			count[c.Tenant]++
		}
	}
	if count["big"] != 48 || count["small"] != 4 {
		t.Errorf("of 52 claims, four at a time, with turns of 12 and 1: %v; want 48 and 4", count)
	}
}

func change(t *testing.T, b *bed) {
	b.put(entry("one"))
	c := b.claim(1, one)[0]
	b.must(b.store.Change(t.Context(), "one", func(i *outbox.Item) error { i.State = outbox.Cancelled; return nil }))
	isConflict(t, "the intent of what was cancelled", b.begin(c))
	mine := errors.New("no")
	if err := b.store.Change(t.Context(), "one", func(*outbox.Item) error { return mine }); !errors.Is(err, mine) {
		t.Errorf("got %v", err)
	}
	if err := b.store.Change(t.Context(), "none", func(*outbox.Item) error { return nil }); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func forget(t *testing.T, b *bed) {
	b.put(entry("accepted"), entry("dead"), entry("queued"))
	claims := b.claim(2, one)
	b.must(b.end(claims[0], outbox.Accepted), b.end(claims[1], outbox.Dead))
	for _, test := range []struct {
		before time.Time
		want   int
	}{{time.Now().Add(-time.Hour), 0}, {time.Now().Add(time.Hour), 1}, {time.Now().Add(time.Hour), 0}} {
		if n, err := b.store.Forget(t.Context(), test.before); err != nil || n != test.want {
			t.Errorf("forgot %d, %v; want %d", n, err, test.want)
		}
	}
	b.put(entry("accepted")) // a new one
	b.want("accepted", outbox.Queued)
	b.want("dead", outbox.Dead)
}

func bodies(t *testing.T, b *bed) {
	for _, size := range []int{1, 1000, 64 << 10, 64<<10 + 1, 3 << 20} {
		text := strings.Repeat("x", size)
		e := entry(fmt.Sprint(size))
		e.Body = smtprelay.Reader(strings.NewReader(text))
		b.put(e)
		b.reopen()
		c := b.claim(1, one)[0]
		for range 2 {
			var got strings.Builder
			if n, err := c.Body.WriteTo(&got); err != nil || n != int64(size) || got.String() != text {
				t.Errorf("of %d octets there are %d, %v", size, n, err)
			}
		}
		b.must(b.begin(c), b.end(c, outbox.Accepted))
	}
	e := entry("fails")
	e.Body = smtprelay.Reader(failing{})
	if err := b.store.Put(t.Context(), []outbox.Entry{e})[0]; !errors.Is(err, errBody) {
		t.Errorf("a body that fails: %v", err)
	}
	if _, err := b.store.Get(t.Context(), "fails"); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("and its message: %v, want ErrNotFound", err)
	}
}

func bodyByID(t *testing.T, b *bed) {
	text := strings.Repeat("x", 3<<20)
	large := entry("large")
	large.Body = smtprelay.Reader(strings.NewReader(text))
	b.put(large, entry("small"))
	for id, want := range map[string]string{"large": text, "small": "Subject: small\r\n\r\nhello\r\n"} {
		body, err := b.store.Body(t.Context(), id)
		b.must(err)
		var got strings.Builder
		if n, err := body.WriteTo(&got); err != nil || n != int64(len(want)) || got.String() != want {
			t.Errorf("of %s there are %d octets, %v; want %d", id, n, err, len(want))
		}
	}
	if _, err := b.store.Body(t.Context(), "none"); !errors.Is(err, outbox.ErrNotFound) {
		t.Errorf("the body of no message: %v, want ErrNotFound", err)
	}
	for _, c := range b.claim(2, one) {
		b.must(b.begin(c))
		if _, err := b.store.Body(t.Context(), c.ID); err != nil {
			t.Errorf("the body of what is being sent: %v", err)
		}
		b.must(b.end(c, outbox.Accepted))
		var err error
		for err == nil { // a store may remove it a little later
			_, err = b.store.Body(t.Context(), c.ID)
			pause()
		}
		if !errors.Is(err, outbox.ErrNotFound) {
			t.Errorf("the body of what was accepted: %v, want ErrNotFound", err)
		}
	}
}

var errBody = errors.New("the template failed")

// failing is a reader that fails.
type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errBody }

func counted(t *testing.T, b *bed) {
	want := func(want outbox.Counts) {
		t.Helper()
		got, err := b.store.Count(t.Context())
		b.must(err)
		if !got.Oldest.Equal(want.Oldest) {
			t.Errorf("the oldest was due at %v, want %v", got.Oldest, want.Oldest)
		}
		if got.Oldest = want.Oldest; got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	want(outbox.Counts{})
	b.put(entry("later", func(i *outbox.Item) { i.Due = i.Due.Add(time.Hour) }))
	want(outbox.Counts{Queued: 1})
	since := time.Now().Add(-time.Minute)
	for i := range 6 {
		b.put(entry(fmt.Sprint(i), func(i *outbox.Item) { i.Due = since }))
	}
	want(outbox.Counts{Queued: 7, Oldest: since})
	claims := b.claim(6, one)
	b.must(b.begin(claims[0]), b.begin(claims[1]), b.end(claims[1], outbox.Accepted), b.end(claims[2], outbox.Dead), b.end(claims[3], outbox.Unknown),
		b.end(claims[4], outbox.Cancelled))
	want(outbox.Counts{Queued: 2, Sending: 1, Dead: 1, Unknown: 1, Oldest: since})
}

func list(t *testing.T, b *bed) {
	var want []string
	for i := range 250 {
		want = append(want, fmt.Sprint(i))
		b.put(entry(fmt.Sprint(i)))
	}
	if got := b.listed(outbox.Queued); !slices.Equal(got, want) {
		t.Errorf("listed %d, want %d in their order", len(got), len(want))
	}
	for range b.store.List(t.Context(), outbox.Queued) {
		break
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range b.store.List(ctx, outbox.Queued) {
		if err == nil {
			t.Error("a list goes on after the end of its context")
		}
	}
}
