//go:build unix

// Here belongs what needs processes: those that are killed, and a relay that counts. Each process is this test's binary again.
package natsslots

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func TestMain(m *testing.M) {
	if name := os.Getenv("NATSSLOTS_SENDER"); name != "" {
		if err := sender(name, os.Getenv("NATSSLOTS_URL"), os.Getenv("NATSSLOTS_ADDR")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// sender sends until its standard input ends.
func sender(name, url, addr string) error {
	slots, nc, err := connect(url, 10, Options{TTL: 4 * time.Second, Grace: time.Second})
	if err != nil {
		return err
	}
	defer nc.Close()
	client, err := smtprelay.New(smtprelay.Config{Addr: addr, TLS: smtprelay.TLSNone, Limits: smtprelay.Limits{Slots: slots, MaxMessagesPerConn: 100}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var senders sync.WaitGroup
	for range 20 {
		senders.Go(func() {
			for ctx.Err() == nil {
				m := smtprelay.Message{From: name + "@x.example", To: []string{"b@y.example"}, Body: smtprelay.Bytes([]byte("Subject: hello\r\n\r\nhello\r\n"))}
				if _, err := client.Send(context.Background(), m); err != nil {
					fmt.Fprintln(os.Stderr, name, err)
					os.Exit(1)
				}
			}
		})
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	cancel()
	senders.Wait()
	if err := client.Shutdown(context.Background()); err != nil {
		return err
	}
	return slots.Close()
}

// running is a sender in a process of its own.
type running struct {
	name  string
	cmd   *exec.Cmd
	input io.Closer
	said  *strings.Builder
}

func begin(t *testing.T, name, url, addr string) *running {
	t.Helper()
	r := &running{name: name, cmd: exec.Command(os.Args[0]), said: new(strings.Builder)}
	r.cmd.Env = append(os.Environ(), "NATSSLOTS_SENDER="+name, "NATSSLOTS_URL="+url, "NATSSLOTS_ADDR="+addr)
	r.cmd.Stderr = r.said
	input, err := r.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.input = input
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return r
}

// tally counts the MAIL commands of each sender, and lets tests wait for them.
type tally struct {
	mu      sync.Mutex
	changed sync.Cond
	mails   map[string]int
}

func (c *tally) see(e smtptest.Event) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	name, _, _ := strings.Cut(e.From, "@")
	c.mails[name]++
	c.changed.Broadcast()
	return false
}

// until waits until each of names has n more, and returns how many all of them have had meanwhile.
func (c *tally) until(n int, names ...string) map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := maps.Clone(c.mails)
	more := map[string]int{}
	for {
		least := math.MaxInt
		for _, name := range names {
			more[name] = c.mails[name] - before[name]
			least = min(least, more[name])
		}
		if least >= n {
			return more
		}
		c.changed.Wait()
	}
}

func TestProcessesShareTheAllowanceAlthoughSomeAreKilled(t *testing.T) {
	count := &tally{mails: map[string]int{}}
	count.changed.L = &count.mu
	relay := smtptest.New(t, func(s *smtptest.Server) {
		s.NoTLS, s.NoAuth, s.DropBodies, s.Delay = true, true, true, 10*time.Millisecond
	})
	relay.Fault(smtptest.Fault{At: smtptest.Mail, When: count.see, Count: -1})
	url := start(t, t.TempDir(), server.RANDOM_PORT).ClientURL()
	var all []*running
	var names []string
	add := func() (name string) {
		name = fmt.Sprintf("sender%d", len(all)+1)
		names = append(names, name)
		all = append(all, begin(t, name, url, relay.Addr()))
		return name
	}
	for range 8 {
		add()
	}
	count.until(1, names...)
	began := time.Now()
	more := count.until(150, names...) // several turns
	least, most, sum := math.MaxInt, 0, 0
	for n := range maps.Values(more) {
		least, most, sum = min(least, n), max(most, n), sum+n
	}
	t.Logf("eight processes at ten places: %v, %.0f a second", more, float64(sum)/time.Since(began).Seconds())
	if 2*least < most {
		t.Errorf("least ÷ most busy is %d ÷ %d, want at least a half", least, most)
	}

	came := time.Now()
	count.until(1, add())
	t.Logf("a newcomer's first message after %v", time.Since(came))

	for _, r := range all[:3] {
		if err := r.cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = r.cmd.Wait()
	}
	add()
	count.until(100, names[3:]...)
	for open := 0; open < 10; open = relay.Stats().Open { // the places of the dead are used again
		count.until(1, names[3])
	}
	for _, r := range all[3:] {
		_ = r.input.Close() // in the middle of what it sends
		if err := r.cmd.Wait(); err != nil {
			t.Errorf("%s: %v: %s", r.name, err, r.said)
		}
	}
	stats := relay.Stats()
	t.Logf("%d connections, %d open at once at most, %d refused", len(relay.Conns()), stats.MaxOpen, stats.Refused)
	if stats.Refused != 0 || stats.MaxOpen > 10 {
		t.Errorf("%d refused, %d open at once; want none, and 10 at most", stats.Refused, stats.MaxOpen)
	}
	if n := len(relay.Conns()); n < 20 {
		t.Errorf("%d connections: the places did not go round", n)
	}
}
