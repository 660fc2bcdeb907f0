package natsstore

import (
	"cmp"
	"container/heap"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"slices"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/outbox"
)

// meta is what the header of a message's record says, for those who follow the log without reading the records.
type meta struct {
	ID       string       `json:"i"`
	Tenant   string       `json:"t,omitempty"`
	Priority int          `json:"p,omitempty"`
	Due      int64        `json:"d"`           // Unix, nanoseconds
	Changed  int64        `json:"c"`           // the same
	State    outbox.State `json:"s"`           //
	Nonce    string       `json:"n,omitempty"` // of the delivery that is or was under way
	Order    int64        `json:"o"`           // who is first: Created; the mail's counts
}

func metaOf(i *outbox.Item, nonce string) meta {
	return meta{ID: i.ID, Tenant: i.Tenant, Priority: i.Priority, Due: i.Due.UnixNano(), Changed: i.Changed.UnixNano(), State: i.State, Nonce: nonce,
		Order: i.Created.UnixNano()}
}

func (m *meta) over() bool { return m.State == outbox.Accepted || m.State == outbox.Cancelled }

// entry is a message that is not over.
type entry struct {
	meta
	token string
	hash  uint64 // says whose it is
	mail  uint64 // the sequence of its mail
	state uint64 // the sequence of what holds: the mail itself, if nothing was tried

	nonce string // of our claim; "": we have none
	at    *place // where it waits for us; nil: nowhere
}

// index is what is in the log, in memory. It is guarded by the Store's lock.
type index struct {
	entries map[string]*entry // by token
	sending map[*entry]struct{}
	mine    func(hash uint64) bool
	turn    time.Time // what is due at this time is ready

	news chan struct{} // has something when a message has come that is ours; has room for one

	ready   map[string]*line // by tenant; none is empty
	tenants []string         // of ready, sorted
	waiting line             // by due
	last    string           // the tenant that had its turn last
	left    int              // of that turn: what no claim had room for
}

func newIndex() *index {
	return &index{entries: map[string]*entry{}, sending: map[*entry]struct{}{}, mine: func(uint64) bool { return false }, news: make(chan struct{}, 1), ready: map[string]*line{}}
}

// tokenOf is the part of the subjects that stands for an ID, which may have any characters.
func tokenOf(id string) string {
	sum := sha256.Sum256([]byte(id))
	return base32.HexEncoding.EncodeToString(sum[:20])
}

// record takes in a record of a message. passed: the log has been followed so far, so that nothing older is to come.
func (x *index) record(subject string, seq uint64, m meta, passed bool) {
	if token, ok := strings.CutPrefix(subject, stateToken); ok {
		x.change(token, seq, m, passed)
	} else if token, ok := strings.CutPrefix(subject, mailToken); ok && m.over() {
		x.change(token, seq, m, passed)
	} else if e := x.entries[token]; ok && (e == nil || e.state < seq) {
		if e != nil { // it was forgotten, and its ID is that of another message
			x.drop(e)
		}
		x.add(token, seq, m)
	}
}

// add adds a message that is new to us.
func (x *index) add(token string, seq uint64, m meta) {
	e := &entry{meta: m, token: token, mail: seq, state: seq}
	e.Tenant = x.intern(e.Tenant)
	sum := sha256.Sum256([]byte(token))
	e.hash = binary.BigEndian.Uint64(sum[:])
	x.entries[token] = e
	x.settle(e)
}

// intern returns a tenant's name as it is in memory already.
func (x *index) intern(tenant string) string {
	if l := x.ready[tenant]; l != nil {
		return l.tenant
	}
	return strings.Clone(tenant)
}

// change takes in what has become of a message.
func (x *index) change(token string, seq uint64, m meta, passed bool) {
	e := x.entries[token]
	if e == nil { // it is over, and its first records are gone
		return
	}
	if seq > e.state {
		m.Order = e.Order
		e.meta, e.state = m, seq
		e.Tenant = x.intern(e.Tenant)
		x.settle(e)
	}
	if passed && seq >= e.state && e.over() {
		x.drop(e)
	}
}

func (x *index) drop(e *entry) {
	x.leave(e)
	delete(x.sending, e)
	delete(x.entries, e.token)
}

// settle puts e where it belongs.
func (x *index) settle(e *entry) {
	x.leave(e)
	delete(x.sending, e)
	if e.State == outbox.Sending {
		x.sending[e] = struct{}{}
	}
	if e.State != outbox.Queued || e.nonce != "" || !x.mine(e.hash) {
		return
	}
	l := &x.waiting
	if e.Due <= x.turn.UnixNano() {
		if l = x.ready[e.Tenant]; l == nil {
			l = &line{tenant: e.Tenant, ready: true}
			x.ready[e.Tenant] = l
			i, _ := slices.BinarySearch(x.tenants, e.Tenant)
			x.tenants = slices.Insert(x.tenants, i, e.Tenant)
		}
	}
	e.at = &place{entry: e, line: l}
	heap.Push(l, e.at)
	select {
	case x.news <- struct{}{}:
	default:
	}
}

// leave takes e from where it is.
func (x *index) leave(e *entry) {
	if e.at == nil {
		return
	}
	l := e.at.line
	heap.Remove(l, e.at.index)
	e.at = nil
	if l.ready && l.Len() == 0 {
		delete(x.ready, l.tenant)
		if i, ok := slices.BinarySearch(x.tenants, l.tenant); ok {
			x.tenants = slices.Delete(x.tenants, i, i+1)
		}
	}
}

// share says which messages are ours. changed: it may be others than before.
func (x *index) share(mine func(hash uint64) bool, changed bool) {
	if x.mine = mine; !changed {
		return
	}
	for _, e := range x.entries {
		if ours := mine(e.hash); ours != (e.at != nil) {
			x.settle(e)
		}
	}
}

// advance makes ready what is due.
func (x *index) advance(now time.Time) {
	if now.After(x.turn) {
		x.turn = now
	}
	for x.waiting.Len() > 0 && x.waiting.places[0].Due <= x.turn.UnixNano() {
		x.settle(x.waiting.places[0].entry)
	}
}

// take claims up to n messages that are ready: around the tenants for as long as there is room; who is alone has all of it.
func (x *index) take(n int, weight func(tenant string) int, nonce func() string) (taken []*entry) {
	for len(taken) < n && len(x.tenants) > 0 {
		i, found := slices.BinarySearch(x.tenants, x.last)
		turn := x.left
		if !found || turn == 0 {
			if found {
				i++
			}
			i %= len(x.tenants)
			turn = max(weight(x.tenants[i]), 1)
		}
		tenant := x.tenants[i]
		want := n - len(taken)
		if len(x.tenants) > 1 {
			want = min(want, turn)
		}
		x.last, x.left = tenant, max(turn-want, 0)
		for l := x.ready[tenant]; want > 0 && l.Len() > 0; want-- {
			e := l.places[0].entry
			x.leave(e)
			e.nonce = nonce()
			taken = append(taken, e)
		}
	}
	return taken
}

// next is when the first message of those that wait is due; zero if none does.
func (x *index) next() time.Time {
	if x.waiting.Len() == 0 {
		return time.Time{}
	}
	return time.Unix(0, x.waiting.places[0].Due)
}

// release ends a claim.
func (x *index) release(e *entry) {
	e.nonce = ""
	x.settle(e)
}

// in returns what says so of the messages in a state, oldest first.
func (x *index) in(state outbox.State) (records []record) {
	var some []*entry
	for _, e := range x.entries {
		if e.State == state {
			some = append(some, e)
		}
	}
	slices.SortFunc(some, func(a, b *entry) int { return cmp.Compare(a.Order, b.Order) })
	for _, e := range some {
		subject := stateToken
		if e.state == e.mail {
			subject = mailToken
		}
		records = append(records, record{subject + e.token, e.state})
	}
	return records
}

// count counts the messages that are not over.
func (x *index) count(now time.Time) (c outbox.Counts) {
	var first *entry
	for _, e := range x.entries {
		switch e.State {
		case outbox.Queued:
			c.Queued++
			if e.Due <= now.UnixNano() && (first == nil || e.Order < first.Order) {
				first = e
			}
		case outbox.Sending:
			c.Sending++
		case outbox.Dead:
			c.Dead++
		case outbox.Unknown:
			c.Unknown++
		}
	}
	if first != nil {
		c.Oldest = time.Unix(0, first.Due)
	}
	return c
}

// line is a heap: of a tenant's messages that are ready, by priority and age; or of those that wait, by due.
type line struct {
	tenant string
	ready  bool
	places []*place
}

// place is an entry in a line.
type place struct {
	*entry
	line  *line
	index int
}

// Len implements heap.Interface.
func (l *line) Len() int { return len(l.places) }

// Less implements heap.Interface.
func (l *line) Less(i, j int) bool {
	a, b := l.places[i].entry, l.places[j].entry
	if !l.ready {
		return a.Due < b.Due
	}
	return cmp.Or(cmp.Compare(b.Priority, a.Priority), cmp.Compare(a.Order, b.Order)) < 0
}

// Swap implements heap.Interface.
func (l *line) Swap(i, j int) {
	l.places[i], l.places[j] = l.places[j], l.places[i]
	l.places[i].index, l.places[j].index = i, j
}

// Push implements heap.Interface.
func (l *line) Push(p any) {
	q := p.(*place)
	q.index = len(l.places)
	l.places = append(l.places, q)
}

// Pop implements heap.Interface.
func (l *line) Pop() any {
	last := len(l.places) - 1
	p := l.places[last]
	l.places[last] = nil
	l.places = l.places[:last]
	return p
}
