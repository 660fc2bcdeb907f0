// Package natsslots shares one allowance of connections among machines. A relay that allows a hundred connections sees a hundred,
// however many machines send to it:
//
//	nc, err := natsslots.Connect("nats://one:4222,nats://two:4222,nats://three:4222")
//	js, err := jetstream.New(nc)
//	slots, err := natsslots.New(ctx, js, "relay-slots", 100, natsslots.Options{Replicas: 3})
//	defer slots.Close()
//	…
//	client, err := smtprelay.New(smtprelay.Config{Addr: …, Limits: smtprelay.Limits{Slots: slots}})
//
// On one machine package fileslots does the same without a server.
//
// # How it works
//
// Each place is a record in a JetStream stream; processes take it and give it back by compare-and-set. A process has one lease for
// all of its places, which it renews every fifth of Options.TTL. If a process does not renew for a TTL, while others see their own
// renewals, they declare it dead and use its places again after Options.Grace. By then it has closed its connections: a process
// that cannot renew ends them with QUIT from half the TTL on, and cuts them at four fifths of it. No clocks are compared.
//
// Places are shared as in fileslots: a process that waits has at most one place fewer than any other, and if places do not divide
// evenly they rotate, one turn a second. A process that starts later gets its first place in about a second, plus the time that a
// connection takes to end.
//
// # What happens when
//
//	a process is killed              its places are used again after TTL and Grace: 17 seconds by default
//	a process ends with Close        at once
//	a process is paused beyond TTL   others use its places; its connections are cut when it goes on: until then the relay has too many
//	the servers are away             no connection is opened; those that are open end from half the TTL on; Sends wait, up to Timeouts.Outage
//	the servers come back            places are taken as before; those whose end nobody knows, after Grace
//	they have lost the stream        for a moment the relay may have too many: run three, with files, as New creates it
//
// Each renewal takes one write, and each change of a place's owner four. Some hundred processes are no load; for thousands give
// each machine a block of connections of its own, and share that with fileslots.
package natsslots

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/natslog"
)

const (
	look = 100 * time.Millisecond // between two looks at who is to give a place back
	turn = time.Second            // how long a place is kept while somebody waits who has one fewer
	skip = 500 * time.Millisecond // how long a free place is left to those whose turn it is

	openTime = 30 * time.Second // for New, if its context has no end

	placeToken  = "place."
	placeHeader = "Place"
)

// Options are the settings of [Slots]. All processes must have the same TTL and Grace.
type Options struct {
	// TTL is how long a process may be silent before it loses its places. It should be twice as long as an election among the
	// servers takes, else an election closes connections. 0 means 15 seconds.
	TTL time.Duration

	// Grace is how long a place that was not given back properly is held back, so that the relay sees the end of its connection
	// first. 0 means 2 seconds; negative means not at all.
	Grace time.Duration

	// Replicas is how many servers keep the places: 1, 3 or 5. 0 means 1. It applies when the stream is created.
	Replicas int
}

// Slots is an allowance that all Slots of the same name share. It is safe for concurrent use, also by several
// Clients.
type Slots struct {
	log   *natslog.Log
	group *natslog.Group
	o     Options

	stop    context.CancelFunc
	running context.Context // until Close
	tasks   sync.WaitGroup

	mu      sync.Mutex    // guards the fields below; never held across I/O
	closed  bool          // no task may begin
	applied uint64        // how far the log was followed
	changed chan struct{} // closed when the log has told something
	places  []place
	waits   map[string]wait // of others and ours, as the log has them
	waiters int             // calls of Acquire under way
	rounds  int             // how often we have begun to wait
	ours    []*held         // by age
}

// place is one as the log has it.
type place struct {
	Owner    string `json:",omitempty"` // a member of the group; "": nobody
	Retiring bool   `json:",omitempty"` // it is about to be given back
	Used     bool   `json:",omitempty"` // it was not given back in order

	seq  uint64
	seen time.Time // when we saw that it has this owner
}

// wait is that of a process.
type wait struct {
	round string // what it tells: which of its waits it is; "": it does not wait
	since uint64 // when it began, in the log
}

// held is a place of ours.
type held struct {
	n            int
	owner        string // whom we were
	retire, lost chan struct{}

	writing sync.Mutex // held for a change of its record
	seq     uint64     // of its record; guarded by writing

	retiring, gone bool // guarded by Slots.mu: retire and lost are closed
	released       bool // guarded by Slots.mu
}

// Connect connects to servers, as in "nats://one:4222,nats://two:4222", with the settings that Slots need: a lost server is noticed
// within seconds, and nothing is buffered to be sent later.
func Connect(url string, more ...nats.Option) (*nats.Conn, error) {
	return nats.Connect(url, append(natslog.Options(), more...)...)
}

// New returns the Slots of that name, with n places in all. The name is that of a stream, which is created if it is not there: letters,
// digits, - and _. Use one for each relay and account. The caller closes the connection of js, after Close.
func New(ctx context.Context, js jetstream.JetStream, name string, n int, o Options) (*Slots, error) {
	if n < 1 {
		return nil, fmt.Errorf("natsslots: %d places: want 1 or more", n)
	}
	if o.TTL < 0 || o.Replicas < 0 {
		return nil, errors.New("natsslots: a negative number in Options")
	}
	o.TTL, o.Grace, o.Replicas = cmp.Or(o.TTL, 15*time.Second), cmp.Or(o.Grace, 2*time.Second), cmp.Or(o.Replicas, 1)
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, openTime)
		defer cancel()
	}
	log, err := natslog.Open(ctx, js, name, o.Replicas)
	if err != nil {
		return nil, fmt.Errorf("natsslots: %w", err)
	}
	s := &Slots{log: log, o: o, places: make([]place, n), waits: map[string]wait{}, changed: make(chan struct{})}
	s.running, s.stop = context.WithCancel(context.Background())
	s.group = natslog.NewGroup(log, o.TTL, s.loseOf)
	if err := s.join(ctx); err != nil {
		s.end()
		return nil, fmt.Errorf("natsslots: %w", err)
	}
	s.background(s.watch)
	return s, nil
}

func (s *Slots) join(ctx context.Context) error {
	seq, err := s.group.Join(ctx)
	if err != nil {
		return err
	}
	s.background(func() { s.log.Follow(s.running, s.see) })
	for {
		s.mu.Lock()
		applied, changed := s.applied, s.changed
		s.mu.Unlock()
		if applied >= seq {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errors.Join(ctx.Err(), s.group.Leave(context.WithoutCancel(ctx)))
		}
	}
}

// Close gives all places back and leaves the group. Close the Clients first: any connection that they still have loses its place.
func (s *Slots) Close() error {
	id := s.group.ID()
	if id == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.o.TTL)
	defer cancel()
	s.settled(ctx)
	s.loseOf(id)
	err := s.group.Leave(ctx) // who cannot say so is buried
	s.end()
	if err != nil {
		return fmt.Errorf("natsslots: %w", err)
	}
	return nil
}

// end ends all tasks.
func (s *Slots) end() {
	s.stop()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.tasks.Wait()
}

// background has a task done, which ends with Close.
func (s *Slots) background(task func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backgroundLocked(task)
}

func (s *Slots) backgroundLocked(task func()) {
	if !s.closed {
		s.tasks.Go(task)
	}
}

// settled waits until what was given back is written down.
func (s *Slots) settled(ctx context.Context) {
	for {
		s.mu.Lock()
		left := slices.ContainsFunc(s.places, func(p place) bool { return p.Owner != "" && p.Owner == s.group.ID() }) && len(s.ours) == 0
		changed := s.changed
		s.mu.Unlock()
		if !left {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// The log.

// see takes in a message of the log.
func (s *Slots) see(m natslog.Message) {
	member, _ := s.group.See(m)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.applied = m.Seq
	if member {
		there := s.group.Members()
		for id, o := range there {
			if o.Row != s.waits[id].round {
				s.waits[id] = wait{o.Row, m.Seq}
			}
		}
		maps.DeleteFunc(s.waits, func(id string, _ wait) bool { _, ok := there[id]; return !ok })
	} else if text, ok := strings.CutPrefix(m.Subject, placeToken); ok {
		var p place
		if n, err := strconv.Atoi(text); err == nil && n < len(s.places) && json.Unmarshal([]byte(m.Header.Get(placeHeader)), &p) == nil {
			s.learnLocked(n, m.Seq, p)
		}
	}
	s.tellLocked()
}

func (s *Slots) tellLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// learnLocked takes in a place's record.
func (s *Slots) learnLocked(n int, seq uint64, p place) {
	was := &s.places[n]
	if seq <= was.seq {
		return
	}
	p.seq, p.seen = seq, time.Now()
	if p.Owner == was.Owner && p.Owner != "" {
		p.seen = was.seen
	}
	*was = p
}

// write replaces a place's record.
func (s *Slots) write(ctx context.Context, n int, expect uint64, p place) (seq uint64, err error) {
	text, err := json.Marshal(p)
	if err != nil {
		return 0, err
	}
	if seq, err = s.log.Write(ctx, placeToken+strconv.Itoa(n), expect, nats.Header{placeHeader: {string(text)}}, nil); err == nil {
		s.mu.Lock()
		s.learnLocked(n, seq, p)
		s.tellLocked()
		s.mu.Unlock()
	}
	return seq, err
}

// Taking.

// Acquire implements [smtprelay.Slots]. While the servers are away it waits.
func (s *Slots) Acquire(ctx context.Context) (smtprelay.Slot, error) {
	s.waiting(1)
	defer s.waiting(-1)
	for {
		if s.running.Err() != nil {
			return smtprelay.Slot{}, errors.New("natsslots: closed")
		}
		s.mu.Lock()
		changed := s.changed
		n, p := s.turnLocked()
		s.mu.Unlock()
		if n >= 0 {
			slot, err := s.take(ctx, n, p)
			if err == nil {
				return slot, nil
			}
			if ctx.Err() != nil {
				return smtprelay.Slot{}, ctx.Err()
			}
		}
		timer := time.NewTimer(look/2 + rand.N(look))
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		case <-s.running.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return smtprelay.Slot{}, ctx.Err()
		}
	}
}

// waiting counts who waits, and tells the others.
func (s *Slots) waiting(more int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiters += more; s.waiters == 1 && more > 0 {
		s.rounds++
	}
	s.group.Tell(s.roundLocked())
}

// roundLocked is what we tell: one who has had a place waits anew, after those who have waited before.
func (s *Slots) roundLocked() string {
	if s.waiters == 0 {
		return ""
	}
	return strconv.Itoa(s.rounds)
}

// turnLocked returns a place for us to take: -1 if none is free, or others have their turn before.
func (s *Slots) turnLocked() (n int, p place) {
	if s.group.Quiet() > s.o.TTL/2 {
		return -1, place{}
	}
	t := s.tableLocked()
	if len(t.free) == 0 {
		return -1, place{}
	}
	i := slices.Index(t.waiting(), t.me)
	if i < 0 || i >= len(t.free) {
		// Those whose turn it is may be dead.
		i = slices.IndexFunc(t.free, func(n int) bool { return t.now.Sub(s.places[n].seen) > skip+rand.N(skip) })
	}
	if i < 0 {
		return -1, place{}
	}
	return t.free[i], s.places[t.free[i]]
}

// take takes a place, and waits until it can be used.
func (s *Slots) take(ctx context.Context, n int, p place) (smtprelay.Slot, error) {
	used := p.Used || p.Owner != "" // its owner is dead
	h := &held{n: n, owner: s.group.ID(), retire: make(chan struct{}), lost: make(chan struct{})}
	seq, err := s.write(ctx, n, p.seq, place{Owner: h.owner, Used: used})
	if err != nil {
		if !errors.Is(err, natslog.ErrConflict) { // it may be ours all the same, or become so
			s.background(func() { s.disown(h, p.seq, used) })
		}
		return smtprelay.Slot{}, err
	}
	h.seq = seq
	s.mu.Lock()
	s.ours = append(s.ours, h)
	gone := h.owner != s.group.ID()
	s.mu.Unlock()
	if gone {
		s.loseOf(h.owner)
	}
	if used && s.o.Grace > 0 {
		timer := time.NewTimer(s.o.Grace)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			s.release(h, false)
			return smtprelay.Slot{}, ctx.Err()
		case <-h.lost:
			s.release(h, false)
			return smtprelay.Slot{}, errors.New("lost")
		}
	}
	return smtprelay.Slot{Retire: h.retire, Lost: h.lost, Release: func(clean bool) { s.release(h, clean) }}, nil
}

// disown gives back a place of which we do not know whether we have taken it.
func (s *Slots) disown(h *held, expect uint64, used bool) {
	for s.group.ID() == h.owner {
		ctx, cancel := context.WithTimeout(s.running, s.o.TTL)
		last, err := s.log.Last(ctx, placeToken+strconv.Itoa(h.n))
		if err == nil {
			var p place
			if json.Unmarshal([]byte(last.Header.Get(placeHeader)), &p) != nil || p.Owner != h.owner {
				if last.Seq > expect { // what comes late replaces nothing
					cancel()
					return
				}
			} else {
				expect = last.Seq
			}
		}
		if err == nil || errors.Is(err, natslog.ErrNotFound) {
			_, err = s.write(ctx, h.n, expect, place{Used: used})
		}
		cancel()
		if err == nil || s.running.Err() != nil {
			return
		}
	}
}

// Giving back.

// release gives h back: in the background, for as long as it is ours.
func (s *Slots) release(h *held, clean bool) {
	s.mu.Lock()
	s.ours = slices.DeleteFunc(s.ours, func(o *held) bool { return o == h })
	h.released = true
	s.mu.Unlock()
	s.background(func() { s.record(h, place{Used: !clean}) })
}

// record changes the record of h: until it is written, or h is another's, or given back and this is about something else.
func (s *Slots) record(h *held, p place) {
	h.writing.Lock()
	defer h.writing.Unlock()
	for s.running.Err() == nil {
		s.mu.Lock()
		late := h.released && p.Owner != ""
		s.mu.Unlock()
		if late {
			return
		}
		ctx, cancel := context.WithTimeout(s.running, s.o.TTL)
		seq, err := s.write(ctx, h.n, h.seq, p)
		cancel()
		switch {
		case err == nil:
			h.seq = seq
			return
		case errors.Is(err, natslog.ErrConflict), h.owner != s.group.ID():
			return
		}
	}
}

// loseOf ends what we had when we were owner.
func (s *Slots) loseOf(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.ours {
		if h.owner == owner && !h.gone {
			h.gone = true
			close(h.lost)
		}
	}
}

// watch looks after our places until Close.
func (s *Slots) watch() {
	for ticker := time.NewTicker(look); ; {
		select {
		case <-s.running.Done():
			ticker.Stop()
			return
		case <-ticker.C:
		}
		quiet := s.group.Quiet()
		s.mu.Lock()
		if quiet > s.o.TTL/2 {
			for _, h := range s.ours {
				h.retireLocked()
			}
		} else if h := s.givesUpLocked(); h != nil {
			h.retireLocked()
			s.backgroundLocked(func() { s.record(h, place{Owner: h.owner, Retiring: true}) })
		}
		id := s.group.ID()
		has := slices.ContainsFunc(s.ours, func(h *held) bool { return h.owner == id })
		s.mu.Unlock()
		if has && quiet > s.o.TTL*4/5 {
			s.group.Abandon()
		}
	}
}

func (h *held) retireLocked() {
	if !h.retiring {
		h.retiring = true
		close(h.retire)
	}
}

// givesUpLocked returns the place of ours that others should have.
func (s *Slots) givesUpLocked() *held {
	t := s.tableLocked()
	if !t.givesUp(t.me) {
		return nil
	}
	i := slices.IndexFunc(s.ours, func(h *held) bool { return !h.retiring && h.owner == t.me })
	if i < 0 {
		return nil
	}
	return s.ours[i]
}

// Sharing.

// table is who has what, and who waits.
type table struct {
	me        string
	now       time.Time
	processes map[string]*process
	free      []int // places: those first that were given back in order
	retiring  int   // places that are about to be free
}

// process is one that waits, or has places.
type process struct {
	held   int       // places, but for those that it gives back
	oldest uint64    // when the oldest of these was taken, in the log
	taken  time.Time // when we saw that
	since  uint64    // when it began to wait, in the log; 0: it does not
	fresh  bool      // it was heard of lately
}

func (s *Slots) tableLocked() *table {
	t := &table{me: s.group.ID(), now: time.Now(), processes: map[string]*process{}}
	for id, m := range s.group.Members() {
		p := &process{fresh: m.Fresh}
		if w := s.waits[id]; w.round != "" {
			p.since = w.since
		}
		t.processes[id] = p
	}
	if t.processes[t.me] == nil {
		t.processes[t.me] = &process{}
	}
	me := t.processes[t.me]
	me.fresh = true
	if round := s.roundLocked(); round == "" {
		me.since = 0
	} else if round != s.waits[t.me].round {
		me.since = s.applied + 1 // the others are about to hear of it
	}
	for n, p := range s.places {
		owner := t.processes[p.Owner]
		switch {
		case p.Owner == "" || owner == nil:
			t.free = append(t.free, n)
		case p.Retiring:
			t.retiring++
		default:
			if owner.held++; owner.held == 1 || p.seq < owner.oldest {
				owner.oldest, owner.taken = p.seq, p.seen
			}
		}
	}
	slices.SortStableFunc(t.free, func(a, b int) int {
		return cmp.Compare(rank(s.places[a]), rank(s.places[b]))
	})
	return t
}

// rank is 0 for a free place that was given back in order.
func rank(p place) int {
	if p.Used || p.Owner != "" {
		return 1
	}
	return 0
}

// those returns the processes for which ok holds, by less.
func (t *table) those(ok func(*process) bool, less func(a, b *process) int) (ids []string) {
	for id, p := range t.processes {
		if ok(p) && p.fresh {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b string) int {
		return cmp.Or(less(t.processes[a], t.processes[b]), cmp.Compare(a, b))
	})
	return ids
}

// waiting returns those who wait: who has the fewest places first, then who has waited longest.
func (t *table) waiting() []string {
	return t.those(func(p *process) bool { return p.since > 0 }, func(a, b *process) int {
		return cmp.Or(cmp.Compare(a.held, b.held), cmp.Compare(a.since, b.since))
	})
}

// givesUp reports whether id is to give a place back: to one who waits and has two fewer, or one fewer for as long as a turn.
// As many give one as wait, less those places that are free or about to be.
func (t *table) givesUp(id string) bool {
	waiting := t.waiting()
	var givers []string
	for _, g := range t.those(func(p *process) bool { return p.held > 0 }, func(a, b *process) int {
		return cmp.Or(cmp.Compare(b.held, a.held), cmp.Compare(a.oldest, b.oldest))
	}) {
		p := t.processes[g]
		if slices.ContainsFunc(waiting, func(w string) bool {
			more := p.held - t.processes[w].held
			return w != g && (more > 1 || more == 1 && t.now.Sub(p.taken) >= turn)
		}) {
			givers = append(givers, g)
		}
	}
	i := slices.Index(givers, id)
	return i >= 0 && i < len(waiting)-len(t.free)-t.retiring
}
