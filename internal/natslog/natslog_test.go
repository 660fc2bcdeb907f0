// Here belongs what a log and a group promise by themselves; what is made of them is tested where it is made.
package natslog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

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

func open(t *testing.T, url string) *Log {
	t.Helper()
	nc, err := nats.Connect(url, Options()...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Open(t.Context(), js, "log", 1)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestWriteReplacesWhatItNamesAndNothingElse(t *testing.T) {
	l := open(t, start(t, t.TempDir(), server.RANDOM_PORT).ClientURL())
	write := func(expect uint64, text string) (uint64, error) {
		return l.Write(t.Context(), "a.b", expect, nil, []byte(text))
	}
	if _, err := write(7, "of nothing"); !errors.Is(err, ErrConflict) {
		t.Errorf("got %v, want ErrConflict", err)
	}
	one, err := write(0, "one")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write(0, "another"); !errors.Is(err, ErrConflict) {
		t.Errorf("got %v, want ErrConflict", err)
	}
	two, err := write(one, "two")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write(one, "late"); !errors.Is(err, ErrConflict) {
		t.Errorf("got %v, want ErrConflict", err)
	}
	if m, err := l.Last(t.Context(), "a.b"); err != nil || string(m.Data) != "two" || m.Seq != two || m.Subject != "a.b" {
		t.Errorf("got %+v, %v", m, err)
	}
	if _, err := l.Last(t.Context(), "a.c"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func TestWriteWhoseAnswerWasLostIsKnownAgainAndAnotherOfTheSameTextIsNot(t *testing.T) {
	l := open(t, start(t, t.TempDir(), server.RANDOM_PORT).ClientURL())
	first, err := l.write(t.Context(), "name", "a", "a", 0, nil, []byte("text"))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := l.write(t.Context(), "name", "a", "a", 0, nil, []byte("text")); err != nil || again != first {
		t.Errorf("got %d, %v; want %d", again, err, first)
	}
	if _, err := l.write(t.Context(), "other name", "a", "a", 0, nil, []byte("text")); !errors.Is(err, ErrConflict) {
		t.Errorf("got %v, want ErrConflict", err)
	}
}

func TestWriteAmongFollowsUponTheLastOfAllSubjectsThatMatch(t *testing.T) {
	l := open(t, start(t, t.TempDir(), server.RANDOM_PORT).ClientURL())
	write := func(subject string, expect uint64) (uint64, error) {
		return l.WriteAmong(t.Context(), "*.x", subject, expect, nil, []byte(subject))
	}
	one, err := write("a.x", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write("b.x", 0); !errors.Is(err, ErrConflict) {
		t.Errorf("b, as if a was not there: %v, want ErrConflict", err)
	}
	two, err := write("b.x", one)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write("a.x", one); !errors.Is(err, ErrConflict) {
		t.Errorf("a, as if b was not there: %v, want ErrConflict", err)
	}
	if _, err := l.WriteAmong(t.Context(), "*.y", "a.y", 0, nil, nil); err != nil {
		t.Error(err)
	}
	if m, err := l.Last(t.Context(), "*.x"); err != nil || m.Seq != two || m.Subject != "b.x" {
		t.Errorf("got %+v, %v; want b", m, err)
	}
	if _, err := write("a.x", two); err != nil {
		t.Error(err)
	}
}

func TestSomeGivesWhatIsThereWithHeaderAndData(t *testing.T) {
	l := open(t, start(t, t.TempDir(), server.RANDOM_PORT).ClientURL())
	var subjects []string
	want := map[string]uint64{}
	for i := range most + 50 { // more than one request
		subject := fmt.Sprint("a.", i)
		if subjects = append(subjects, subject); i%100 != 0 {
			continue
		}
		seq, err := l.Write(t.Context(), subject, 0, nats.Header{"H": {subject}}, []byte(subject))
		if err != nil {
			t.Fatal(err)
		}
		want[subject] = seq
	}
	got := map[string]uint64{}
	l.Some(t.Context(), subjects, func(m Message) {
		if got[m.Subject] = m.Seq; string(m.Data) != m.Subject || m.Header.Get("H") != m.Subject {
			t.Errorf("got %+v", m)
		}
	})
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestFollowGoesOnWhereItWasWhenTheServerComesBack(t *testing.T) {
	dir := t.TempDir()
	first := start(t, dir, server.RANDOM_PORT)
	url, port := first.ClientURL(), first.Addr().(*net.TCPAddr).Port
	l := open(t, url)
	seen := make(chan string, 100)
	ctx, cancel := context.WithCancel(t.Context())
	followed := make(chan struct{})
	go func() {
		defer close(followed)
		l.Follow(ctx, func(m Message) { seen <- m.Subject })
	}()
	put := func(subject string) {
		t.Helper()
		if _, err := l.Write(t.Context(), subject, 0, nil, nil); err != nil {
			t.Fatal(err)
		}
		if got := <-seen; got != subject {
			t.Errorf("got %s, want %s", got, subject)
		}
	}
	put("a")
	stop(first)
	start(t, dir, port)
	put("b")
	cancel()
	<-followed
}

func TestScanYieldsAllOfATokenInOrder(t *testing.T) {
	l := open(t, start(t, t.TempDir(), server.RANDOM_PORT).ClientURL())
	scan := func() (got []string) {
		t.Helper()
		if err := l.Scan(t.Context(), "a", false, func(m Message) bool { got = append(got, string(m.Data)); return true }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := scan(); len(got) != 0 {
		t.Errorf("got %v of nothing", got)
	}
	var want []string
	var seqs []uint64
	for i := range 150 {
		text := fmt.Sprint(i)
		seq, err := l.Write(t.Context(), "a."+text, 0, nil, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Write(t.Context(), "b."+text, 0, nil, []byte(text)); err != nil {
			t.Fatal(err)
		}
		want, seqs = append(want, text), append(seqs, seq)
	}
	if got := scan(); !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	for range 2 { // the second time it is gone
		if err := l.RemoveUpTo(t.Context(), "*.0", seqs[0]); err != nil {
			t.Error(err)
		}
	}
	if got := scan(); !slices.Equal(got, want[1:]) {
		t.Errorf("got %v after the first was removed", got)
	}
	if err := l.RemoveAll(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if got := scan(); len(got) != 0 {
		t.Errorf("got %v after all were removed", got)
	}
}

// follower is a group as one process has it.
type follower struct {
	*Group
	lost chan string
}

func join(t *testing.T, url string, lease time.Duration) *follower {
	t.Helper()
	l := open(t, url)
	f := &follower{lost: make(chan string, 10)}
	f.Group = NewGroup(l, lease, func(id string) { f.lost <- id })
	if _, err := f.Join(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	followed := make(chan struct{})
	go func() {
		defer close(followed)
		l.Follow(ctx, func(m Message) { f.See(m) })
	}()
	t.Cleanup(func() {
		cancel()
		<-followed
	})
	return f
}

func (f *follower) until(ok func() bool) {
	for !ok() {
		time.Sleep(5 * time.Millisecond) // nobody tells
	}
}

func TestMemberThatIsSilentIsBuriedAndFindsOut(t *testing.T) {
	url := start(t, t.TempDir(), server.RANDOM_PORT).ClientURL()
	one, two := join(t, url, time.Second), join(t, url, time.Second)
	id := two.ID()
	one.until(func() bool { return one.Has(id) })
	two.Tell("something")
	one.until(func() bool { return one.Members()[id].Row == "something" })
	two.stop() // as one that is paused
	<-two.done
	last, err := two.log.Last(t.Context(), memberToken+id)
	if err != nil {
		t.Fatal(err)
	}
	one.until(func() bool { return !one.Has(id) })
	if two.Quiet() < time.Second {
		t.Errorf("it was buried after %v", two.Quiet())
	}
	ctx, cancel := context.WithCancel(t.Context())
	two.stop, two.done = cancel, make(chan struct{})
	go two.beat(ctx, last.Seq)
	if got := <-two.lost; got != id {
		t.Errorf("it has lost %s, want %s", got, id)
	}
	one.until(func() bool { return one.Has(two.ID()) }) // as another one
	for _, f := range []*follower{one, two} {
		if err := f.Leave(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
