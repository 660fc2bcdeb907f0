package smtprelay

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
)

// Here belongs the order in which those who wait are served, and what it costs to leave.

func TestQueueServesUrgentOnesFirstButForEveryEighthTurn(t *testing.T) {
	q := newQueue()
	add := func(n int, a ask) (all []*waiter) {
		for range n {
			w := &waiter{ask: a}
			q.add(w)
			all = append(all, w)
		}
		return all
	}
	others, urgent := add(3, ask{}), add(20, ask{urgent: true})
	again := add(1, ask{again: true})[0]
	others = append([]*waiter{again}, others...) // one that was throttled goes before its kind
	for turn := range 24 {
		want := &urgent
		if len(urgent) == 0 || turn%othersTurn == othersTurn-1 {
			want = &others
		}
		if w := q.serve(); w != (*want)[0] {
			t.Fatalf("turn %d went to the wrong one", turn)
		}
		*want = (*want)[1:]
	}
	if q.len() != 0 || q.next() != nil {
		t.Errorf("%d are left", q.len())
	}
}

func TestAllWhoWaitAreVisitedThoughTheyLeave(t *testing.T) {
	q := newQueue()
	for i := range 10 {
		q.add(&waiter{ask: ask{urgent: i%3 == 0}})
	}
	visited := 0
	q.all(func(w *waiter) {
		visited++
		w.at.remove()
	})
	if visited != 10 || q.len() != 0 {
		t.Errorf("%d were visited, %d are left", visited, q.len())
	}
}

// BenchmarkCancelWaiting is the cost of one that leaves a queue of 100,000, in random order.
func BenchmarkCancelWaiting(b *testing.B) {
	const waiting = 100_000
	c, err := New(Config{Addr: "relay.example:25", TLS: TLSNone})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	cancel()
	b.ReportAllocs()
	for n := 0; n < b.N; n += waiting {
		b.StopTimer()
		all := make([]*waiter, waiting)
		for i := range all {
			all[i] = &waiter{ctx: ctx}
			c.pool.queue.add(all[i])
		}
		c.pool.waiting.Store(waiting)
		rand.Shuffle(waiting, func(i, j int) { all[i], all[j] = all[j], all[i] })
		b.StartTimer()
		for _, w := range all {
			c.pool.forget(w)
		}
	}
}

// What belongs here: tests of list, the queue of those who wait and of free connections.

func TestListKeepsItsOrderWhateverIsTakenOut(t *testing.T) {
	type element struct {
		links[element]
		n int
	}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		l := list[element]{links: func(e *element) *links[element] { return &e.links }}
		var want []*element
		for step := range 100 {
			switch k := r.IntN(3); {
			case k == 0:
				e := &element{n: step}
				l.pushBack(e)
				want = append(want, e)
			case k == 1:
				e := &element{n: step}
				l.pushFront(e)
				want = slices.Insert(want, 0, e)
			case len(want) > 0:
				i := r.IntN(len(want))
				want[i].remove()
				want[i].remove() // it is in no list any more
				want = slices.Delete(want, i, i+1)
			}
			var forwards, backwards []*element
			for e := l.first; e != nil; e = e.next {
				forwards = append(forwards, e)
			}
			for e := l.last; e != nil; e = e.prev {
				backwards = append(backwards, e)
			}
			slices.Reverse(backwards)
			if l.len != len(want) || !slices.Equal(forwards, want) || !slices.Equal(backwards, want) {
				t.Fatalf("seed %d, step %d: %d elements, %d forwards, %d backwards, want %d", seed, step, l.len, len(forwards), len(backwards), len(want))
			}
		}
	}
}
