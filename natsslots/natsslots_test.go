// Here belongs how places are shared out, by several Slots in one process, and what happens while the servers are away. What needs processes
// that die is in processes_test.go.
package natsslots

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// start starts a server for other processes too.
func start(t *testing.T, dir string, port int) *server.Server {
	t.Helper()
	s, err := server.NewServer(&server.Options{JetStream: true, StoreDir: dir, Host: "127.0.0.1", Port: port, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("the server does not start")
	}
	t.Cleanup(func() { stop(s) })
	return s
}

func stop(s *server.Server) {
	s.Shutdown()
	s.WaitForShutdown()
}

// connect returns Slots with a connection of their own.
func connect(url string, n int, o Options) (*Slots, *nats.Conn, error) {
	nc, err := Connect(url)
	if err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, nil, err
	}
	s, err := New(context.Background(), js, "slots", n, o)
	return s, nc, err
}

// member is a process that wants as many places as it can get, and gives back those that are wanted at once.
type member struct {
	*Slots
	nc     *nats.Conn
	cancel context.CancelFunc
	all    sync.WaitGroup

	mu      sync.Mutex
	changed sync.Cond
	has     int
	retired int
	lost    int
	first   time.Time     // when it got its first place
	had     time.Duration // places, added up
}

func join(t *testing.T, url string, n int, o Options) *member {
	t.Helper()
	s, nc, err := connect(url, n, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	m := &member{Slots: s, nc: nc, cancel: cancel}
	m.changed.L = &m.mu
	t.Cleanup(func() { m.leave() })
	m.all.Go(func() {
		for {
			slot, err := s.Acquire(ctx)
			if err != nil {
				return
			}
			began := time.Now()
			m.change(func() {
				m.has++
				if m.first.IsZero() {
					m.first = began
				}
			})
			m.all.Go(func() {
				clean := true
				select {
				case <-slot.Lost:
					clean = false
					m.change(func() { m.lost++ })
				case <-slot.Retire:
					m.change(func() { m.retired++ })
				case <-ctx.Done():
				}
				m.change(func() {
					m.has--
					m.had += time.Since(began)
				})
				slot.Release(clean)
			})
		}
	})
	return m
}

func (m *member) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	m.changed.Broadcast()
}

// until waits until ok holds.
func (m *member) until(ok func() bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for !ok() {
		m.changed.Wait()
	}
}

// leave ends the member and returns how long it has had places, all added up.
func (m *member) leave() time.Duration {
	m.cancel()
	m.all.Wait()
	_ = m.Close()
	m.nc.Close()
	return m.had
}

func TestOneProcessHasAllPlacesAndANewcomerHasItsFirstWithinTwoSeconds(t *testing.T) {
	url := start(t, t.TempDir(), server.RANDOM_PORT).ClientURL()
	one := join(t, url, 10, Options{})
	one.until(func() bool { return one.has == 10 })
	came := time.Now()
	two := join(t, url, 10, Options{})
	two.until(func() bool { return two.has == 5 })
	one.until(func() bool { return one.has == 5 })
	if wait := two.first.Sub(came); wait > 2*time.Second {
		t.Errorf("the newcomer had its first place after %v", wait)
	}
	one.leave()
	two.until(func() bool { return two.has == 10 })
}

func TestPlacesThatDoNotDivideEvenlyGoRound(t *testing.T) {
	url := start(t, t.TempDir(), server.RANDOM_PORT).ClientURL()
	var members []*member
	for range 5 {
		members = append(members, join(t, url, 3, Options{}))
	}
	for _, m := range members { // two of five have none, at any moment
		m.until(func() bool { return m.retired >= 3 })
	}
	least, most := time.Duration(-1), time.Duration(0)
	for _, m := range members {
		m.cancel()
	}
	for _, m := range members {
		had := m.leave()
		most = max(most, had)
		if least < 0 || had < least {
			least = had
		}
	}
	if 2*least < most {
		t.Errorf("one had places for %v and another for %v", least, most)
	}
}

func TestPlaceThatWasNotGivenBackInOrderIsHeldBackForGrace(t *testing.T) {
	const grace = 300 * time.Millisecond
	url := start(t, t.TempDir(), server.RANDOM_PORT).ClientURL()
	s, nc, err := connect(url, 1, Options{Grace: grace})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	defer s.Close()
	acquire := func(heldBack, clean bool) {
		t.Helper()
		began := time.Now()
		slot, err := s.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := time.Since(began); heldBack != (got >= grace) {
			t.Errorf("the place came after %v; held back: want %t", got, heldBack)
		}
		slot.Release(clean)
		s.mu.Lock()
		for s.places[0].Owner != "" {
			changed := s.changed
			s.mu.Unlock()
			<-changed
			s.mu.Lock()
		}
		s.mu.Unlock()
	}
	acquire(false, true)
	acquire(false, false)
	ctx, cancel := context.WithTimeout(t.Context(), grace/3)
	defer cancel()
	if slot, err := s.Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %+v, %v; want the end of the context", slot, err)
	}
	acquire(true, true) // it was given up while it was held back
	acquire(false, true)
}

func TestProcessThatIsCutOffHasLostItsPlacesBeforeOthersHaveThem(t *testing.T) {
	url := start(t, t.TempDir(), server.RANDOM_PORT).ClientURL()
	o := Options{TTL: time.Second, Grace: -1}
	one, cut, err := connect(url, 1, o)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	slot, err := one.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cut.Close()
	two, nc, err := connect(url, 1, o)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	defer two.Close()
	got, err := two.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, was := range map[string]<-chan struct{}{"Retire": slot.Retire, "Lost": slot.Lost} {
		select {
		case <-was:
		default:
			t.Errorf("two have the one place: %s is not closed", name)
		}
	}
	got.Release(true)
}

func TestWhileTheServersAreAwayPlacesEndAndNoneIsGivenAndThenAllGoesOn(t *testing.T) {
	dir := t.TempDir()
	first := start(t, dir, server.RANDOM_PORT)
	url, port := first.ClientURL(), first.Addr().(*net.TCPAddr).Port
	m := join(t, url, 3, Options{TTL: time.Second, Grace: 10 * time.Millisecond})
	m.until(func() bool { return m.has == 3 })
	stop(first)
	m.until(func() bool { return m.has == 0 })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if slot, err := m.Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %+v, %v; want the end of the context", slot, err)
	}
	start(t, dir, port)
	m.until(func() bool { return m.has == 3 })
}

func TestMistakesAreTold(t *testing.T) {
	url := start(t, t.TempDir(), server.RANDOM_PORT).ClientURL()
	if _, nc, err := connect(url, 0, Options{}); err == nil {
		t.Error("no places are no error")
	} else {
		nc.Close()
	}
	nc, err := Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), js, "no name", 1, Options{}); err == nil {
		t.Error("a name with a space is no error")
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "theirs", Subjects: []string{"theirs.>"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), js, "theirs", 1, Options{}); err == nil {
		t.Error("somebody else's stream is no error")
	}
	if _, err := New(t.Context(), js, "slots", 1, Options{Replicas: 3}); err == nil {
		t.Error("three replicas on one server are no error")
	}
}
