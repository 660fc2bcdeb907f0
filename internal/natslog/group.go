package natslog

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Group is who is there: each member writes a message of its own every fifth of the lease. A member of which the others have seen
// nothing for a whole lease, while they have seen their own, is buried: its message is replaced by one that says so. It
// finds that out with its next message at the latest, and is another member from then on. No clocks are compared: all
// see all messages in one order, and while the servers are away nobody's time runs.
type Group struct {
	log   *Log
	lease time.Duration
	lost  func(id string)

	told chan struct{} // the row has changed; has room for one
	stop context.CancelFunc
	done chan struct{} // closed when the beats have ended

	mu     sync.Mutex // guards the fields below
	id     string
	good   time.Time // when the write of our last message was begun that has succeeded
	row    string
	others map[string]*member // our own too
	ticked time.Time          // when the last tick was
}

// member is a process as another one sees it.
type member struct {
	seq    uint64
	row    string
	seen   time.Time
	silent int // how many ticks have come since its last one
}

const (
	// Beats is how many messages a member writes during a lease.
	Beats = 5

	memberToken = "member."
	deadHeader  = "Dead"
	rowHeader   = "Row"
	longGone    = time.Hour // how long the message of one that is gone is kept
)

// NewGroup returns a group that nobody has joined yet. lost is called with a member that we were, and are not any more: with no
// lock held, from a goroutine of the group.
func NewGroup(l *Log, lease time.Duration, lost func(id string)) *Group {
	return &Group{log: l, lease: lease, lost: lost, told: make(chan struct{}, 1), others: map[string]*member{}}
}

// Join makes us a member, and returns the sequence of the message that says so. Leave ends it.
func (g *Group) Join(ctx context.Context) (seq uint64, err error) {
	g.mu.Lock()
	g.id = rand.Text()
	id, row := g.id, g.row
	g.mu.Unlock()
	begun := time.Now()
	if seq, err = g.write(ctx, id, row, 0); err != nil {
		return 0, err
	}
	g.mu.Lock()
	g.good = begun
	g.mu.Unlock()
	beating, stop := context.WithCancel(context.Background())
	g.stop, g.done = stop, make(chan struct{})
	go g.beat(beating, seq)
	return seq, nil
}

// Leave ends the membership.
func (g *Group) Leave(ctx context.Context) error {
	g.stop()
	<-g.done
	g.mu.Lock()
	id := g.id
	g.id = ""
	g.mu.Unlock()
	return g.bury(ctx, id, 0)
}

// ID is who we are; "" if we are no member. It changes when we were buried.
func (g *Group) ID() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.id
}

// Quiet is how long ago a message was begun by which the others know that we are there.
func (g *Group) Quiet() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Since(g.good)
}

// Tell tells the others something, at once.
func (g *Group) Tell(row string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if row == g.row {
		return
	}
	g.row = row
	select {
	case g.told <- struct{}{}:
	default:
	}
}

// Abandon makes us another member: what the one we were has is lost. Others are told when they can be.
func (g *Group) Abandon() {
	g.mu.Lock()
	was := g.id
	if was != "" {
		g.renameLocked()
	}
	g.mu.Unlock()
	if was != "" {
		g.lost(was)
	}
}

// renameLocked makes us another member, of which nothing is written yet: until then Quiet is long.
func (g *Group) renameLocked() { g.id, g.good = rand.Text(), time.Time{} }

// Has reports whether a member is there, as far as the log has been followed.
func (g *Group) Has(id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.others[id] != nil
}

// Member is one of the group.
type Member struct {
	Row   string // what it tells
	Fresh bool   // it was heard of lately
}

// Members returns who is there, by ID.
func (g *Group) Members() map[string]Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make(map[string]Member, len(g.others))
	for id, m := range g.others {
		all[id] = Member{Row: m.row, Fresh: m.silent < 2}
	}
	return all
}

// beat writes our messages.
func (g *Group) beat(ctx context.Context, seq uint64) {
	defer close(g.done)
	id := g.ID()
	for timer := time.NewTimer(g.lease / Beats); ; timer.Reset(g.lease / Beats) {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-g.told:
		}
		g.mu.Lock()
		was := id
		id = g.id
		row := g.row
		g.mu.Unlock()
		if was != id { // by Abandon
			seq = 0
			go func() { _ = g.bury(ctx, was, 0) }() // else others do; ends with ctx
		}
		begun := time.Now()
		try, cancel := context.WithTimeout(ctx, g.lease)
		next, err := g.write(try, id, row, seq)
		cancel()
		switch {
		case err == nil:
			seq = next
			g.mu.Lock()
			if g.id == id {
				g.good = begun
			}
			g.mu.Unlock()
		case errors.Is(err, ErrConflict): // we were buried, or forgotten
			g.mu.Lock()
			lost := g.id == id
			if lost {
				g.renameLocked()
			}
			g.mu.Unlock()
			if lost {
				g.lost(id)
			}
			select {
			case g.told <- struct{}{}:
			default:
			}
		}
	}
}

func (g *Group) write(ctx context.Context, id, row string, expect uint64) (uint64, error) {
	return g.log.Write(ctx, memberToken+id, expect, nats.Header{rowHeader: {row}}, nil, jetstream.WithMsgTTL(longGone))
}

// bury says of a member that it is no more: where its last message is of that sequence, or in any case where that is 0.
func (g *Group) bury(ctx context.Context, id string, expect uint64) error {
	for always := expect == 0; ; {
		if always {
			last, err := g.log.Last(ctx, memberToken+id)
			if errors.Is(err, ErrNotFound) || err == nil && last.Header.Get(deadHeader) != "" {
				return nil
			} else if err != nil {
				return err
			}
			expect = last.Seq
		}
		_, err := g.log.Write(ctx, memberToken+id, expect, nats.Header{deadHeader: {"1"}}, nil, jetstream.WithMsgTTL(longGone))
		if !always || !errors.Is(err, ErrConflict) {
			return err
		}
	}
}

// See takes in a message of the log, in Follow's order. It reports whether that was about a member, and whether it was a tick: one of
// our own, a fifth of the lease after the last one or more. This is when to look after others.
func (g *Group) See(m Message) (member, tick bool) {
	id, ok := strings.CutPrefix(m.Subject, memberToken)
	if !ok {
		return false, false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.Header.Get(deadHeader) != "" {
		delete(g.others, id)
		return true, false
	}
	g.seeLocked(id, m)
	now := time.Now()
	if id != g.id || now.Sub(g.ticked) < g.lease/Beats*9/10 { // one that tells something comes besides
		return true, false
	}
	g.ticked = now
	for id, o := range g.others {
		if id == g.id {
			continue
		}
		if o.silent++; o.silent > Beats && now.Sub(o.seen) >= g.lease {
			o.silent, o.seen = Beats, now // not at once again
			ctx, cancel := context.WithTimeout(context.Background(), g.lease)
			go func(seq uint64) { // ends with ctx
				defer cancel()
				_ = g.bury(ctx, id, seq) // one who is late by little conflicts; else the next time
			}(o.seq)
		}
	}
	return true, true
}

func (g *Group) seeLocked(id string, m Message) {
	o := g.others[id]
	if o == nil {
		o = &member{}
		g.others[id] = o
	}
	*o = member{seq: m.Seq, row: m.Header.Get(rowHeader), seen: time.Now()}
}
