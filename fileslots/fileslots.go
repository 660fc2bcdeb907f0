// Package fileslots shares one allowance of connections among the processes of a machine. A relay that allows ten connections
// sees ten, however many processes send to it:
//
//	slots, err := fileslots.New("/run/shop/relay", 10, 0)
//	…
//	client, err := smtprelay.New(smtprelay.Config{Addr: …, Limits: smtprelay.Limits{Slots: slots}})
//
// Each place is a lock on a file (flock), which the kernel releases when a process dies. Nothing needs to be cleaned up.
//
// Places are handed out so that a process that waits has at most one place fewer than any other. If places do not divide evenly
// they rotate: a process with one place more than a waiting process gives one back after a second. A process that starts later gets
// its first place in about a second, plus the time that a connection takes to end. Each change of owner costs a new connection.
//
// The directory must be on a file system of this machine on which flock works; all processes must be able to write to it,
// and pass the same number of places. Use one directory for each relay and account. A process that is stopped (SIGSTOP) keeps
// its places, and its connections. It works on Linux, macOS and the BSDs.
package fileslots

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
)

const (
	look   = 40 * time.Millisecond  // between two looks of one who waits
	watch  = 100 * time.Millisecond // between two looks of one who has places
	fresh  = time.Second            // how long a process that has not looked is believed to be there
	turn   = time.Second            // how long a place is kept while somebody waits who has one fewer
	forget = time.Minute            // when a process that has not looked is forgotten
)

// Slots is an allowance that all Slots of the same directory share. It is safe for concurrent use, also by several
// Clients.
type Slots struct {
	dir   string
	n     int
	grace time.Duration
	id    string

	mu       sync.Mutex // guards the fields below; never held across I/O
	places   []*place   // by age
	waiters  int        // calls of Acquire under way
	since    time.Time  // when the first of these began
	watching bool       // a goroutine looks after places
}

// New returns the Slots of dir, which is created if it is not there, with n places in all.
//
// A process that is killed frees its locks before the relay has seen the ends of its connections: a place that was not given back
// properly is held back for grace before it is used again. 0 means 2 seconds; negative means not at all.
//
// It is an error if n is less than 1, or if dir cannot be created, written or locked.
func New(dir string, n int, grace time.Duration) (*Slots, error) {
	if n < 1 {
		return nil, fmt.Errorf("fileslots: %d places: want 1 or more", n)
	}
	if grace == 0 {
		grace = 2 * time.Second
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, fmt.Errorf("fileslots: %w", err)
	}
	s := &Slots{dir: dir, n: n, grace: grace, id: rand.Text()}
	if err := s.locked(context.Background(), func(*table) error { return nil }); err != nil {
		return nil, fmt.Errorf("fileslots: %w", err)
	}
	return s, nil
}

// place is a slot of ours.
type place struct {
	file     *os.File // locked
	taken    time.Time
	retire   chan struct{}
	retiring bool // guarded by Slots.mu
}

// Acquire implements [smtprelay.Slots].
func (s *Slots) Acquire(ctx context.Context) (_ smtprelay.Slot, err error) {
	s.mu.Lock()
	if s.waiters++; s.waiters == 1 {
		s.since = time.Now()
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.waiters--
		s.mu.Unlock()
		if err != nil { // others do not wait for our turn any more
			s.tell()
		}
	}()
	for {
		p, used, err := s.try(ctx)
		if err != nil {
			return smtprelay.Slot{}, fmt.Errorf("fileslots: %w", err)
		}
		wait := look/2 + mrand.N(look)
		if p != nil && used {
			wait = s.grace
		}
		if p == nil || used && s.grace > 0 {
			if err := sleep(ctx, wait); err != nil {
				if p != nil {
					s.release(p, false)
				}
				return smtprelay.Slot{}, err
			}
		}
		if p != nil {
			return smtprelay.Slot{Retire: p.retire, Release: func(clean bool) { s.release(p, clean) }}, nil
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// try takes a place if one is free and it is our turn; nil if not. used: its last owner has not given it back in order.
func (s *Slots) try(ctx context.Context) (p *place, used bool, err error) {
	err = s.locked(ctx, func(t *table) error {
		if t.taken() >= s.n { // as far as is known; not to open all files at each look
			return nil
		}
		free, err := s.free()
		if err != nil {
			return err
		}
		for i, file := range free {
			if i > 0 || t.turnOf(s.id) >= len(free) {
				file.Close()
				continue
			}
			info, err := file.Stat()
			if err != nil {
				return err
			}
			used = info.Size() > 0
			if _, err := file.WriteAt([]byte("taken\n"), 0); err != nil {
				return err
			}
			p = &place{file: file, taken: time.Now(), retire: make(chan struct{})}
			s.mu.Lock()
			s.places = append(s.places, p)
			s.mu.Unlock()
		}
		return nil
	})
	if p != nil {
		s.watch()
	}
	return p, used, err
}

// free returns the files of the places that nobody has, locked, those first that were given back in order.
func (s *Slots) free() (free []*os.File, err error) {
	defer func() {
		if err != nil {
			for _, f := range free {
				f.Close()
			}
		}
	}()
	clean := 0
	for i := range s.n {
		file, err := open(filepath.Join(s.dir, fmt.Sprintf("slot-%04d", i)))
		if err != nil {
			return free, err
		}
		switch ok, err := lock(file); {
		case err != nil:
			file.Close()
			return free, err
		case !ok:
			file.Close()
			continue
		}
		free = append(free, file)
		if info, err := file.Stat(); err == nil && info.Size() == 0 {
			free[clean], free[len(free)-1] = file, free[clean]
			clean++
		}
	}
	return free, nil
}

func open(name string) (*os.File, error) {
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o666)
}

// release gives p back. What stands in its file tells the next owner that it was not given back in order.
func (s *Slots) release(p *place, clean bool) {
	s.mu.Lock()
	s.places = slices.DeleteFunc(s.places, func(q *place) bool { return p == q })
	s.mu.Unlock()
	if clean {
		_ = p.file.Truncate(0) // else the next owner waits, which does no harm
	}
	_ = p.file.Close() // and with it the lock
	s.tell()
}

// tell brings our row up to date. That it fails does no harm: it is believed for a second only.
func (s *Slots) tell() {
	ctx, cancel := context.WithTimeout(context.Background(), fresh) // one that is stopped may have the table
	defer cancel()
	_ = s.locked(ctx, func(*table) error { return nil })
}

// watch looks after the places until there are none.
func (s *Slots) watch() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watching {
		return
	}
	s.watching = true
	go func() { // ends with the last place, which is the Client's to give back
		for {
			time.Sleep(watch)
			s.mu.Lock()
			if len(s.places) == 0 {
				s.watching = false
				s.mu.Unlock()
				return
			}
			s.mu.Unlock()
			s.share()
		}
	}()
}

// share gives a place back if others should have it.
func (s *Slots) share() {
	ctx, cancel := context.WithTimeout(context.Background(), fresh)
	defer cancel()
	_ = s.locked(ctx, func(t *table) error { // an error is told by the next Acquire
		if !t.givesUp(s.id) {
			return nil
		}
		if free, err := s.free(); err != nil || len(free) > 0 { // they will be taken
			for _, f := range free {
				f.Close()
			}
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, p := range s.places {
			if !p.retiring {
				p.retiring = true
				close(p.retire)
				break
			}
		}
		return nil
	})
}

// table is what processes tell each other. What matters (who has which place) is in the locks; this is about whose turn it is.
type table struct {
	Processes map[string]process

	now time.Time
}

// process is one that waits, or has places.
type process struct {
	Held     int       // places, but for those that it gives back
	Retiring int       // those
	Oldest   time.Time // when the oldest of Held was taken
	Since    time.Time // when it began to wait; zero: it does not
	Looked   time.Time // when it told this
}

// locked calls f with the table while no other process has it, with our own row brought up to date before and after.
func (s *Slots) locked(ctx context.Context, f func(*table) error) error {
	file, err := open(filepath.Join(s.dir, "table"))
	if err != nil {
		return err
	}
	defer file.Close()
	for {
		ok, err := lock(file)
		if err != nil {
			return err
		}
		if ok {
			break
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	t := &table{now: time.Now()}
	if text, err := io.ReadAll(file); err != nil {
		return err
	} else if json.Unmarshal(text, t) != nil || t.Processes == nil {
		t.Processes = map[string]process{} // its last writer was killed: each tells its own again
	}
	maps.DeleteFunc(t.Processes, func(_ string, p process) bool { return t.now.Sub(p.Looked).Abs() > forget })
	t.Processes[s.id] = s.own(t.now)
	if err := f(t); err != nil {
		return err
	}
	t.Processes[s.id] = s.own(t.now)
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	if err := file.Truncate(0); err != nil {
		return err
	}
	_, err = file.WriteAt(text, 0)
	return err
}

// own is our row.
func (s *Slots) own(now time.Time) process {
	s.mu.Lock()
	defer s.mu.Unlock()
	row := process{Looked: now}
	if s.waiters > 0 {
		row.Since = s.since
	}
	for _, p := range s.places {
		if p.retiring {
			row.Retiring++
			continue
		}
		if row.Held++; row.Held == 1 {
			row.Oldest = p.taken
		}
	}
	return row
}

// there returns the processes for which ok holds and that are there, by less.
func (t *table) there(ok func(process) bool, less func(a, b process) int) (ids []string) {
	for id, p := range t.Processes {
		if ok(p) && t.now.Sub(p.Looked).Abs() < fresh {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b string) int {
		return cmp.Or(less(t.Processes[a], t.Processes[b]), cmp.Compare(a, b))
	})
	return ids
}

// waiting returns those who wait: who has the fewest places first, then who has waited longest.
func (t *table) waiting() []string {
	return t.there(func(p process) bool { return !p.Since.IsZero() }, func(a, b process) int {
		return cmp.Or(cmp.Compare(a.Held, b.Held), a.Since.Compare(b.Since))
	})
}

// turnOf is how many have their turn before id.
func (t *table) turnOf(id string) int { return slices.Index(t.waiting(), id) }

// taken is how many places those who are there have.
func (t *table) taken() (n int) {
	for _, id := range t.there(func(process) bool { return true }, func(process, process) int { return 0 }) {
		n += t.Processes[id].Held + t.Processes[id].Retiring
	}
	return n
}

// givesUp reports whether id is to give a place back: to one who waits and has two fewer, or one fewer for as long as a turn.
// As many give one as wait, less those that are on their way.
func (t *table) givesUp(id string) bool {
	waiting := t.waiting()
	var givers []string
	for _, g := range t.there(func(p process) bool { return p.Held > 0 }, func(a, b process) int {
		return cmp.Or(cmp.Compare(b.Held, a.Held), a.Oldest.Compare(b.Oldest))
	}) {
		p := t.Processes[g]
		if slices.ContainsFunc(waiting, func(w string) bool {
			more := p.Held - t.Processes[w].Held
			return w != g && (more > 1 || more == 1 && t.now.Sub(p.Oldest) >= turn)
		}) {
			givers = append(givers, g)
		}
	}
	due := len(waiting)
	for _, id := range t.there(func(p process) bool { return p.Retiring > 0 }, func(process, process) int { return 0 }) {
		due -= t.Processes[id].Retiring
	}
	i := slices.Index(givers, id)
	return i >= 0 && i < due
}
