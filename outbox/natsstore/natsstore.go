package natsstore

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/natslog"
	"github.com/smtprelay/smtprelay/outbox"
)

// Options are the settings of a [Store].
type Options struct {
	// Name is the name of the stream. Stores with different names are independent. "" means "outbox". It may have letters, digits,
	// - and _.
	Name string

	// Replicas is how many servers keep each message: 1, 3 or 5. 0 means 1. It applies when the stream is created.
	Replicas int

	// Existing makes New open an existing stream and create none: without one it fails with jetstream.ErrStreamNotFound. It is for
	// programs that administer the store of a service.
	Existing bool

	// Lease is how long a worker may be silent before it is declared dead, and what it was sending becomes Unknown. All workers
	// must have the same. It should be longer than an election among the servers takes. 0 means 10 seconds.
	Lease time.Duration
}

// Store is an [outbox.Store] in JetStream.
type Store struct {
	log   *natslog.Log
	lease time.Duration
	large int // a body that is larger is in parts

	stop      context.CancelFunc
	running   context.Context // until Close
	following sync.Once
	tasks     sync.WaitGroup
	group     *natslog.Group

	mu       sync.Mutex // guards the fields below; never held across I/O
	closed   bool       // no task may begin
	index    *index
	applied  uint64        // how far the log was followed
	moved    chan struct{} // closed when applied has grown
	claims   map[string]*claim
	attached bool
	working  bool     // attached, and the log was followed until then
	parking  bool     // what is left is being parked: one at a time
	workers  []string // who is there, as the messages are shared
	before   []string // the same until a moment ago; nil: long enough
	since    time.Time
}

var (
	_ outbox.Store  = (*Store)(nil)
	_ outbox.Newser = (*Store)(nil)
)

// claim is a message that we have in hand.
type claim struct {
	token string
	nonce string
	tried bool // its state is in a record of its own
	item  outbox.Item
	state uint64 // the sequence of the record that says so
	mail  mail
}

// mail is the record of a mail.
type mail struct {
	Item  outbox.Item
	Parts string `json:",omitempty"` // the tokens of the subjects of its body's parts; "": the body follows
	Count int    `json:",omitempty"` // of parts

	body []byte
}

// The records of a message are those of two subjects. The later one is what holds: each write names the sequence of the last one of both
// that it follows upon, which is the compare-and-set that all agree upon.
const (
	mailToken  = "mail."  // + token: envelope and body as they were enqueued; when it is over, what has become of it, in their place
	stateToken = "state." // + token: what has become of it until then
	bothToken  = "*."     // + token: both
	partToken  = "part"   // + token + a random one + number

	metaHeader = "Outbox"

	opTime     = 10 * time.Second // for what has no deadline of its own
	intentTime = 5 * time.Second  // for an intent or an end
	together   = 64               // requests under way at once
)

// Connect connects to servers, as in "nats://one:4222,nats://two:4222", with the settings that a store needs: a lost server is
// noticed within seconds, and nothing is buffered to be sent later. A server that cannot be reached yet is no error.
func Connect(url string, more ...nats.Option) (*nats.Conn, error) {
	return nats.Connect(url, append(natslog.Options(), more...)...)
}

// New opens the store, and creates it if there is none. The caller closes nc, after the store.
func New(nc *nats.Conn, o Options) (*Store, error) {
	if o.Name == "" {
		o.Name = "outbox"
	}
	if o.Replicas == 0 {
		o.Replicas = 1
	}
	if o.Lease == 0 {
		o.Lease = 10 * time.Second
	}
	if o.Lease < 0 || o.Replicas < 0 {
		return nil, errors.New("natsstore: a negative number in Options")
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("natsstore: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*opTime)
	defer cancel()
	replicas := o.Replicas
	if o.Existing {
		replicas = natslog.Existing
	}
	log, err := natslog.Open(ctx, js, o.Name, replicas)
	if err != nil {
		return nil, fmt.Errorf("natsstore: %w", err)
	}
	s := &Store{log: log, lease: o.Lease, large: int(nc.MaxPayload() / 2), index: newIndex(), moved: make(chan struct{}), claims: map[string]*claim{}}
	s.running, s.stop = context.WithCancel(context.Background())
	s.group = natslog.NewGroup(log, o.Lease, func(string) {})
	return s, nil
}

// Close implements [outbox.Store].
func (s *Store) Close() error {
	err := s.detach()
	s.stop()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.tasks.Wait()
	return err
}

// background has a task done, which ends with Close.
func (s *Store) background(task func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backgroundLocked(task)
}

func (s *Store) backgroundLocked(task func()) {
	if !s.closed {
		s.tasks.Go(task)
	}
}

// Following.

// follow follows the log from the first call on, and returns when it has come so far as seq.
func (s *Store) follow(ctx context.Context, seq uint64) error {
	s.following.Do(func() {
		s.background(func() { s.log.Follow(s.running, s.see) })
	})
	for {
		s.mu.Lock()
		applied, moved := s.applied, s.moved
		s.mu.Unlock()
		if applied >= seq {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.running.Done():
			return errClosed
		}
	}
}

var errClosed = errors.New("the store is closed")

// see takes in a message of the log.
func (s *Store) see(m natslog.Message) {
	member, tick := s.group.See(m)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.applied = m.Seq
	close(s.moved)
	s.moved = make(chan struct{})
	if member {
		if s.working { // not for each member on the way through an old log
			s.shareLocked(time.Now())
		}
		if s.working && tick {
			s.parkLocked()
		}
		return
	}
	var header meta
	if json.Unmarshal([]byte(m.Header.Get(metaHeader)), &header) != nil {
		return // a part or a mark
	}
	s.index.record(m.Subject, m.Seq, header, true)
}

// learn takes in what we have written ourselves, before it comes with the others.
func (s *Store) learn(subject string, seq uint64, header meta) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.applied > 0 && seq > s.applied { // else all of it is still to come
		s.index.record(subject, seq, header, false)
	}
}

// write writes a record of a message, in the place of its last one, whose sequence is expect.
func (s *Store) write(ctx context.Context, subject, token string, expect uint64, header meta, data []byte) (seq uint64, err error) {
	text, err := json.Marshal(header)
	if err != nil {
		return 0, err
	}
	if seq, err = s.log.WriteAmong(ctx, bothToken+token, subject+token, expect, nats.Header{metaHeader: {string(text)}}, data); err == nil {
		s.learn(subject+token, seq, header)
	}
	return seq, err
}

// writeState writes what has become of a message. Once it is over its body is gone with that.
func (s *Store) writeState(ctx context.Context, token string, expect uint64, i *outbox.Item, nonce string) (seq uint64, err error) {
	text, err := json.Marshal(i)
	if err != nil {
		return 0, err
	}
	header, subject := metaOf(i, nonce), stateToken
	if header.over() {
		subject = mailToken
	}
	return s.write(ctx, subject, token, expect, header, text)
}

// withTime is ctx with an end.
func withTime(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// atOnce calls f for each of n, several at once.
func atOnce(n int, f func(i int)) {
	if n == 1 {
		f(0)
		return
	}
	room := make(chan struct{}, together)
	var all sync.WaitGroup
	for i := range n {
		room <- struct{}{}
		all.Go(func() {
			defer func() { <-room }()
			f(i)
		})
	}
	all.Wait()
}

// Messages.

// Put implements [outbox.Store].
func (s *Store) Put(ctx context.Context, entries []outbox.Entry) []error {
	errs := make([]error, len(entries))
	first := map[string]int{} // of an ID
	var some []int
	var bodies []*spool
	var orders []int64
	for i, e := range entries {
		if _, ok := first[e.ID]; ok {
			continue
		}
		first[e.ID] = i
		b := &spool{s: s, ctx: ctx, parts: partToken + "." + tokenOf(e.ID) + "." + rand.Text()}
		if errs[i] = b.take(e.Body); errs[i] != nil {
			b.remove()
			continue
		}
		order := e.Created.UnixNano()
		if n := len(orders); n > 0 {
			order = max(order, orders[n-1]+1) // they may arrive in another order than this
		}
		some, bodies, orders = append(some, i), append(bodies, b), append(orders, order)
	}
	atOnce(len(some), func(k int) {
		added, err := s.put(ctx, &entries[some[k]].Item, orders[k], bodies[k])
		if err == nil && !added {
			bodies[k].remove()
		}
		if err != nil { // the mail may be there all the same: else Attach removes its parts
			err = fmt.Errorf("natsstore: %w", err)
		}
		errs[some[k]] = err
	})
	for i, e := range entries {
		errs[i] = errs[first[e.ID]]
	}
	return errs
}

func (s *Store) put(ctx context.Context, i *outbox.Item, order int64, b *spool) (added bool, err error) {
	ctx, cancel := withTime(ctx, opTime)
	defer cancel()
	m := mail{Item: *i}
	if b.count > 0 {
		m.Parts, m.Count = b.parts, b.count
	}
	text, err := json.Marshal(m)
	if err != nil {
		return false, err
	}
	data := append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
	header := metaOf(i, "")
	header.Order = order
	_, err = s.write(ctx, mailToken, tokenOf(i.ID), 0, header, append(data, b.text...))
	if errors.Is(err, natslog.ErrConflict) {
		return false, nil
	}
	return err == nil, err
}

// record is one of a message's.
type record struct {
	subject string
	seq     uint64
}

// read reads records, or later ones of the same subjects; nil stands for one that is gone. One request goes to any server for all of them, and one
// to the leader for each that the server did not have.
func (s *Store) read(ctx context.Context, some []record) (messages []*natslog.Message, err error) {
	subjects := make([]string, len(some))
	for i, r := range some {
		subjects[i] = r.subject
	}
	got := map[string]*natslog.Message{}
	s.log.Some(ctx, subjects, func(m natslog.Message) { got[m.Subject] = &m })
	messages = make([]*natslog.Message, len(some))
	errs := make([]error, len(some))
	atOnce(len(some), func(i int) {
		if m := got[some[i].subject]; m != nil && m.Seq >= some[i].seq {
			messages[i] = m
			return
		}
		if messages[i], errs[i] = s.log.Last(ctx, some[i].subject); errors.Is(errs[i], natslog.ErrNotFound) {
			errs[i] = nil
		}
	})
	return messages, errors.Join(errs...)
}

// mail reads the record of a mail; ErrNotFound if there is none, or the message is over.
func (s *Store) mail(ctx context.Context, token string) (mail, error) {
	r, err := s.log.Last(ctx, mailToken+token)
	if errors.Is(err, natslog.ErrNotFound) {
		err = outbox.ErrNotFound
	}
	if err != nil {
		return mail{}, err
	}
	return mailOf(r)
}

func mailOf(r *natslog.Message) (mail, error) {
	header, err := headerOf(r)
	if err == nil && header.over() {
		err = outbox.ErrNotFound
	}
	if err != nil {
		return mail{}, err
	}
	var m mail
	if len(r.Data) >= 4 {
		if n := int(binary.BigEndian.Uint32(r.Data)); n <= len(r.Data)-4 {
			m.body = r.Data[4+n:]
			err := json.Unmarshal(r.Data[4:4+n], &m)
			return m, err
		}
	}
	return mail{}, fmt.Errorf("the record %s is cut short", r.Subject)
}

func headerOf(r *natslog.Message) (header meta, err error) {
	err = json.Unmarshal([]byte(r.Header.Get(metaHeader)), &header)
	return header, err
}

// load reads what has become of a message, and the sequence of the record that says so. It is ErrNotFound if there is none.
func (s *Store) load(ctx context.Context, token string) (header meta, i outbox.Item, seq uint64, err error) {
	r, err := s.log.Last(ctx, bothToken+token)
	if errors.Is(err, natslog.ErrNotFound) {
		err = outbox.ErrNotFound
	}
	if err != nil {
		return meta{}, outbox.Item{}, 0, err
	}
	header, i, err = itemOf(r)
	return header, i, r.Seq, err
}

// itemOf is what a record says of a message.
func itemOf(r *natslog.Message) (header meta, i outbox.Item, err error) {
	if header, err = headerOf(r); err != nil {
		return header, i, err
	}
	if header.over() || strings.HasPrefix(r.Subject, stateToken) {
		return header, i, json.Unmarshal(r.Data, &i)
	}
	m, err := mailOf(r)
	return header, m.Item, err
}

// Get implements [outbox.Store].
func (s *Store) Get(ctx context.Context, id string) (outbox.Item, error) {
	ctx, cancel := withTime(ctx, opTime)
	defer cancel()
	_, i, _, err := s.load(ctx, tokenOf(id))
	return i, ours(err)
}

// Body implements [outbox.Store].
func (s *Store) Body(ctx context.Context, id string) (io.WriterTo, error) {
	ctx, cancel := withTime(ctx, opTime)
	defer cancel()
	m, err := s.mail(ctx, tokenOf(id))
	if err != nil {
		return nil, ours(err)
	}
	return s.bodyOf(&m), nil
}

// ours is err with our name, where the outbox does not look for it.
func ours(err error) error {
	if err == nil || errors.Is(err, outbox.ErrNotFound) || errors.Is(err, outbox.ErrConflict) {
		return err
	}
	return fmt.Errorf("natsstore: %w", err)
}

// Change implements [outbox.Store].
func (s *Store) Change(ctx context.Context, id string, f func(*outbox.Item) error) error {
	ctx, cancel := withTime(ctx, opTime)
	defer cancel()
	return ours(s.change(ctx, tokenOf(id), f))
}

func (s *Store) change(ctx context.Context, token string, f func(*outbox.Item) error) error {
	for {
		_, i, seq, err := s.load(ctx, token)
		if err != nil {
			return err
		}
		if err := f(&i); err != nil {
			return err
		}
		var m mail
		if header := metaOf(&i, ""); header.over() {
			if m, err = s.mail(ctx, token); err != nil && !errors.Is(err, outbox.ErrNotFound) {
				return err
			}
		}
		if _, err = s.writeState(ctx, token, seq, &i, ""); err == nil && m.Parts != "" {
			_ = s.log.RemoveAll(ctx, m.Parts) // else Attach does
		}
		if !errors.Is(err, natslog.ErrConflict) {
			return err
		}
	}
}

// List implements [outbox.Store].
func (s *Store) List(ctx context.Context, state outbox.State) iter.Seq2[outbox.Item, error] {
	return func(yield func(outbox.Item, error) bool) {
		more := true
		visit := func(i outbox.Item) bool {
			more = i.State != state || yield(i, nil)
			return more
		}
		var err error
		if state == outbox.Accepted || state == outbox.Cancelled {
			err = s.listOver(ctx, visit)
		} else {
			err = s.listIndex(ctx, state, visit)
		}
		if err != nil && more {
			yield(outbox.Item{}, ours(err))
		}
	}
}

// page is how many records a list has read at once.
const page = 100

// listOver lists from the log what is over and not in the index.
func (s *Store) listOver(ctx context.Context, visit func(outbox.Item) bool) (err error) {
	var some []record
	more := true
	flush := func() bool {
		more, err = s.visit(ctx, some, visit)
		some = some[:0]
		return more && err == nil
	}
	scanErr := s.log.Scan(ctx, strings.TrimSuffix(mailToken, "."), true, func(m natslog.Message) bool {
		if header, err := headerOf(&m); err == nil && header.over() {
			some = append(some, record{m.Subject, m.Seq})
		}
		return len(some) < page || flush()
	})
	if scanErr == nil && err == nil && more {
		flush()
	}
	return errors.Join(scanErr, err)
}

func (s *Store) listIndex(ctx context.Context, state outbox.State, visit func(outbox.Item) bool) error {
	seq, err := s.log.Mark(ctx)
	if err == nil {
		err = s.follow(ctx, seq)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	all := s.index.in(state)
	s.mu.Unlock()
	for some := range slices.Chunk(all, page) {
		if more, err := s.visit(ctx, some, visit); !more || err != nil {
			return err
		}
	}
	return nil
}

// visit calls f with what some records say, until it returns false.
func (s *Store) visit(ctx context.Context, some []record, f func(outbox.Item) bool) (more bool, err error) {
	messages, err := s.read(ctx, some)
	if err != nil {
		return false, err
	}
	for _, m := range messages {
		if m == nil {
			continue
		}
		_, i, err := itemOf(m)
		if err != nil || !f(i) {
			return false, err
		}
	}
	return true, nil
}

// Count implements [outbox.Store].
func (s *Store) Count(ctx context.Context) (c outbox.Counts, err error) {
	ctx, cancel := withTime(ctx, opTime)
	defer cancel()
	seq, err := s.log.Mark(ctx)
	if err == nil {
		err = s.follow(ctx, seq)
	}
	if err != nil {
		return c, ours(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index.count(time.Now()), nil
}

// forgetMost is how many messages Forget removes at most.
const forgetMost = 1000

// Forget implements [outbox.Store].
func (s *Store) Forget(ctx context.Context, before time.Time) (n int, err error) {
	var some []natslog.Message
	err = s.log.Scan(ctx, strings.TrimSuffix(mailToken, "."), true, func(m natslog.Message) bool {
		if header, err := headerOf(&m); err == nil && header.over() && header.Changed < before.UnixNano() {
			some = append(some, m)
		}
		return len(some) < forgetMost && m.Time.Before(before)
	})
	errs := make([]error, len(some))
	atOnce(len(some), func(k int) {
		ctx, cancel := withTime(ctx, opTime)
		defer cancel()
		errs[k] = s.log.RemoveUpTo(ctx, bothToken+strings.TrimPrefix(some[k].Subject, mailToken), some[k].Seq)
	})
	for _, e := range errs {
		if e == nil {
			n++
		} else {
			err = errors.Join(err, e)
		}
	}
	return n, ours(err)
}

// Working.

// Attach implements [outbox.Store]. There may be several workers.
func (s *Store) Attach(ctx context.Context) (detach func() error, parked int, err error) {
	s.mu.Lock()
	was := s.attached
	s.attached = true
	s.mu.Unlock()
	if was {
		return nil, 0, outbox.ErrWorking
	}
	parked, err = s.attach(ctx)
	s.mu.Lock()
	s.attached, s.working = err == nil, err == nil
	s.mu.Unlock()
	if err != nil {
		return nil, 0, ours(err)
	}
	return s.detach, parked, nil
}

func (s *Store) attach(ctx context.Context) (parked int, err error) {
	ctx, cancel := withTime(ctx, 3*opTime)
	defer cancel()
	seq, err := s.group.Join(ctx)
	if err != nil {
		return 0, err
	}
	if err := s.follow(ctx, seq); err != nil {
		return 0, errors.Join(err, s.group.Leave(ctx))
	}
	me := s.group.ID()
	s.mu.Lock()
	s.workers = slices.DeleteFunc(slices.Sorted(maps.Keys(s.group.Members())), func(id string) bool { return id == me })
	s.shareLocked(time.Now())
	left := s.leftLocked()
	s.mu.Unlock()
	s.background(func() { s.sweep(s.running) })
	return s.park(ctx, left), nil
}

// detach ends our work, if there is any. What was under way becomes Unknown: others see to it.
func (s *Store) detach() error {
	s.mu.Lock()
	was := s.attached
	s.attached, s.working = false, false
	for token, c := range s.claims {
		s.releaseLocked(token, c)
	}
	s.mu.Unlock()
	if !was {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), intentTime)
	defer cancel()
	err := s.group.Leave(ctx) // who cannot say so is buried
	s.mu.Lock()
	s.index.share(func(uint64) bool { return false }, true)
	s.mu.Unlock()
	return ours(err)
}

// shareLocked shares the messages among the workers that are there. What changes its owner is left alone for a while: its former one may
// have it in hand, though only one of two could write an intent.
func (s *Store) shareLocked(now time.Time) {
	workers := slices.Sorted(maps.Keys(s.group.Members()))
	changed := !slices.Equal(workers, s.workers)
	switch {
	case changed:
		s.before, s.workers, s.since = s.workers, workers, now
	case s.before != nil && now.Sub(s.since) > s.lease/natslog.Beats:
		s.before, changed = nil, true
	}
	me := s.group.ID()
	before := s.before
	s.index.share(func(hash uint64) bool {
		if owner(workers, hash) != me || me == "" {
			return false
		}
		was := owner(before, hash)
		return was == me || !slices.Contains(workers, was)
	}, changed)
}

// owner is which of the workers a message belongs to: that for which a number made of both is the largest. A worker that comes or
// goes changes nothing between the others.
func owner(workers []string, hash uint64) (id string) {
	most := uint64(0)
	for _, w := range workers {
		h := fnv.New64a()
		_, _ = io.WriteString(h, w)
		// As in splitmix64.
		n := (h.Sum64() ^ hash) * 0xbf58476d1ce4e5b9
		n = (n ^ n>>27) * 0x94d049bb133111eb
		if n ^= n >> 31; n >= most {
			most, id = n, w
		}
	}
	return id
}

// leftLocked returns the messages that a worker which is gone was sending, and that are ours to see to.
func (s *Store) leftLocked() (tokens []string) {
	for e := range s.index.sending {
		worker, _, _ := strings.Cut(e.Nonce, ".")
		if !s.group.Has(worker) && owner(s.workers, e.hash) == s.group.ID() {
			tokens = append(tokens, e.token)
		}
	}
	return tokens
}

// parkLocked parks what is left, in the background.
func (s *Store) parkLocked() {
	left := s.leftLocked()
	if s.parking || len(left) == 0 {
		return
	}
	s.parking = true
	s.backgroundLocked(func() {
		ctx, cancel := context.WithTimeout(s.running, opTime)
		defer cancel()
		s.park(ctx, left) // the rest with the next tick
		s.mu.Lock()
		s.parking = false
		s.mu.Unlock()
	})
}

// park makes messages Unknown that a worker which is gone was sending, and returns how many.
func (s *Store) park(ctx context.Context, tokens []string) (n int) {
	parked := make([]bool, len(tokens))
	atOnce(len(tokens), func(k int) {
		header, i, seq, err := s.load(ctx, tokens[k])
		worker, _, _ := strings.Cut(header.Nonce, ".")
		if err != nil || header.State != outbox.Sending || s.group.Has(worker) {
			return
		}
		i.State, i.Changed, i.Reason = outbox.Unknown, time.Now(), "the worker died while it was sent"
		_, err = s.writeState(ctx, tokens[k], seq, &i, "")
		parked[k] = err == nil // else it has ended, or the next one sees to it
	})
	for _, p := range parked {
		if p {
			n++
		}
	}
	return n
}

// errAway is returned by a worker of which the others have heard nothing for so long that they may take it for dead.
var errAway = errors.New("the servers do not answer")

// News implements [outbox.Newser].
func (s *Store) News() <-chan struct{} { return s.index.news }

// away reports whether we may be taken for dead.
func (s *Store) away() bool { return s.group.Quiet() > s.lease*4/5 }

// Claim implements [outbox.Store].
func (s *Store) Claim(ctx context.Context, now time.Time, n int, weight func(tenant string) int) (claims []outbox.Claim, next time.Time, err error) {
	me := s.group.ID()
	if me == "" {
		return nil, time.Time{}, errors.New("natsstore: Claim without Attach")
	}
	if s.away() {
		return nil, time.Time{}, ours(errAway)
	}
	s.mu.Lock()
	s.index.advance(now)
	taken := s.index.take(n, weight, func() string { return me + "." + rand.Text() })
	next = s.index.next()
	mine := make([]*claim, len(taken))
	first := make([]int, len(taken)) // of each one's records
	var some []record
	for k, e := range taken {
		mine[k], first[k] = &claim{token: e.token, nonce: e.nonce, tried: e.state != e.mail, state: e.state}, len(some)
		s.claims[e.token] = mine[k]
		if some = append(some, record{mailToken + e.token, e.mail}); mine[k].tried {
			some = append(some, record{stateToken + e.token, e.state})
		}
	}
	s.mu.Unlock()
	ctx, cancel := withTime(ctx, opTime)
	defer cancel()
	messages, err := s.read(ctx, some)
	for k, c := range mine {
		if err == nil {
			if c.take(messages[first[k]:]) {
				claims = append(claims, outbox.Claim{Item: c.item, Nonce: c.nonce, Body: s.bodyOf(&c.mail)})
				continue
			}
			_ = s.refresh(ctx, c.token) // else the next Claim does
		}
		s.mu.Lock()
		s.releaseLocked(c.token, c)
		s.mu.Unlock()
	}
	return claims, next, ours(err)
}

// take takes in the records of the message, the first of these. It reports false if the message is not as the index says.
func (c *claim) take(messages []*natslog.Message) bool {
	last := messages[0]
	if last == nil {
		return false
	}
	var err error
	if c.mail, err = mailOf(last); err != nil {
		return false
	}
	c.item = c.mail.Item
	if c.tried {
		if last = messages[1]; last == nil {
			return false
		}
		_, c.item, err = itemOf(last)
	}
	return err == nil && last.Seq == c.state && c.item.State == outbox.Queued
}

// refresh corrects the index about a message that is not as it says. It returns ErrConflict.
func (s *Store) refresh(ctx context.Context, token string) error {
	header, _, seq, err := s.load(ctx, token)
	if err != nil && !errors.Is(err, outbox.ErrNotFound) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.index.change(token, seq, header, seq <= s.applied)
	} else if e := s.index.entries[token]; e != nil { // it was forgotten
		s.index.drop(e)
	}
	return outbox.ErrConflict
}

// Release implements [outbox.Store].
func (s *Store) Release(ids ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		token := tokenOf(id)
		if c := s.claims[token]; c != nil {
			s.releaseLocked(token, c)
		}
	}
}

// releaseLocked ends a claim, if it is still there.
func (s *Store) releaseLocked(token string, c *claim) {
	if s.claims[token] != c {
		return
	}
	delete(s.claims, token)
	if e := s.index.entries[token]; e != nil && e.nonce == c.nonce {
		s.index.release(e)
	}
}

// claimed returns our claim of that nonce and what the index says of the message.
func (s *Store) claimed(token, nonce string) (c *claim, now meta) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.index.entries[token]; e != nil {
		now = e.meta
	}
	if c = s.claims[token]; c != nil && c.nonce != nonce {
		c = nil
	}
	return c, now
}

// Begin implements [outbox.Store].
func (s *Store) Begin(ctx context.Context, intents []outbox.Intent) []error {
	errs := make([]error, len(intents))
	atOnce(len(intents), func(k int) {
		ctx, cancel := withTime(ctx, intentTime)
		defer cancel()
		errs[k] = ours(s.begin(ctx, tokenOf(intents[k].ID), intents[k].Nonce))
	})
	return errs
}

func (s *Store) begin(ctx context.Context, token, nonce string) error {
	c, now := s.claimed(token, nonce)
	switch {
	case c == nil, now.ID == "":
		return outbox.ErrConflict
	case now.State == outbox.Sending && now.Nonce == nonce:
		return nil
	case !strings.HasPrefix(nonce, s.group.ID()+"."), s.away():
		return errAway
	}
	i := c.item
	i.State, i.Changed = outbox.Sending, time.Now()
	seq, err := s.writeState(ctx, token, c.state, &i, nonce)
	if errors.Is(err, natslog.ErrConflict) {
		return s.refresh(ctx, token)
	}
	if err == nil {
		c.state = seq
	}
	return err
}

// End implements [outbox.Store].
func (s *Store) End(ctx context.Context, ends []outbox.End) []error {
	errs := make([]error, len(ends))
	atOnce(len(ends), func(k int) {
		ctx, cancel := withTime(ctx, intentTime)
		defer cancel()
		errs[k] = ours(s.end(ctx, tokenOf(ends[k].ID), &ends[k]))
	})
	return errs
}

func (s *Store) end(ctx context.Context, token string, end *outbox.End) error {
	c, _ := s.claimed(token, end.Nonce)
	if c == nil {
		return outbox.ErrConflict
	}
	for {
		_, err := s.writeState(ctx, token, c.state, &end.Item, end.Nonce)
		if err == nil {
			break
		}
		if !errors.Is(err, natslog.ErrConflict) {
			return err
		}
		// An intent or an end of ours may have been written, and its answer lost.
		header, _, seq, err := s.load(ctx, token)
		switch {
		case errors.Is(err, outbox.ErrNotFound) || err == nil && header.Nonce != end.Nonce:
			return s.refresh(ctx, token)
		case err != nil:
			return err
		case header.State == outbox.Sending:
			c.state = seq
			continue
		case header.State != end.State:
			return outbox.ErrConflict
		}
		break
	}
	s.mu.Lock()
	s.releaseLocked(token, c)
	s.mu.Unlock()
	if c.mail.Parts != "" && (end.State == outbox.Accepted || end.State == outbox.Cancelled) {
		s.background(func() {
			ctx, cancel := context.WithTimeout(s.running, opTime)
			defer cancel()
			_ = s.log.RemoveAll(ctx, c.mail.Parts) // else Attach does
		})
	}
	return nil
}

// Bodies.

// spool takes a body, into memory; into parts in the log once it is large.
type spool struct {
	s     *Store
	ctx   context.Context
	parts string // the tokens of their subjects
	count int
	text  []byte
}

func (b *spool) take(body io.WriterTo) error {
	if body == nil {
		return errors.New("natsstore: a message without body")
	}
	if _, err := body.WriteTo(b); err != nil {
		return err
	}
	if b.count > 0 && len(b.text) > 0 {
		return b.flush()
	}
	return nil
}

// Write implements io.Writer.
func (b *spool) Write(p []byte) (n int, err error) {
	for n < len(p) {
		if len(b.text) == b.s.large {
			if err := b.flush(); err != nil {
				return n, err
			}
		}
		some := min(b.s.large-len(b.text), len(p)-n)
		b.text = append(b.text, p[n:n+some]...)
		n += some
	}
	return n, nil
}

// flush writes a part.
func (b *spool) flush() error {
	ctx, cancel := withTime(b.ctx, opTime)
	defer cancel()
	if _, err := b.s.log.Write(ctx, fmt.Sprintf("%s.%d", b.parts, b.count), 0, nil, b.text); err != nil {
		return fmt.Errorf("natsstore: %w", err)
	}
	b.count++
	b.text = b.text[:0]
	return nil
}

// remove removes the parts.
func (b *spool) remove() {
	if b.count == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.ctx), opTime)
	defer cancel()
	_ = b.s.log.RemoveAll(ctx, b.parts) // else Attach does
}

func (s *Store) bodyOf(m *mail) io.WriterTo {
	if m.Parts == "" {
		return smtprelay.Bytes(m.body)
	}
	return &parts{s.log, m.Parts, m.Count}
}

// parts is a body in parts.
type parts struct {
	log    *natslog.Log
	tokens string
	count  int
}

// WriteTo implements io.WriterTo.
func (p *parts) WriteTo(w io.Writer) (n int64, err error) {
	for i := range p.count {
		ctx, cancel := context.WithTimeout(context.Background(), opTime)
		m, err := p.log.Last(ctx, fmt.Sprintf("%s.%d", p.tokens, i))
		cancel()
		if err != nil {
			return n, fmt.Errorf("natsstore: part %d of a body: %w", i, err)
		}
		some, err := w.Write(m.Data)
		if n += int64(some); err != nil {
			return n, err
		}
	}
	return n, nil
}

// sweepAge is how old a part must be whose mail does not name it, to be removed: a younger one may be that of a Put under way.
const sweepAge = time.Hour

// sweep removes parts that no mail names: their process has died on the way.
func (s *Store) sweep(ctx context.Context) {
	named := map[string]bool{}                                          // by the tokens of parts
	_ = s.log.Scan(ctx, partToken, true, func(p natslog.Message) bool { // else the next Attach
		tokens := p.Subject[:strings.LastIndexByte(p.Subject, '.')]
		if _, ok := named[tokens]; !ok && time.Since(p.Time) > sweepAge {
			m, err := s.mail(ctx, strings.Split(tokens, ".")[1])
			named[tokens] = err != nil && !errors.Is(err, outbox.ErrNotFound) || m.Parts == tokens
			if !named[tokens] {
				_ = s.log.RemoveAll(ctx, tokens)
			}
		}
		return true
	})
}
