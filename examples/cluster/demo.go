package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/smtptest"
)

// ledger has the outcomes of the messages.
type ledger struct {
	messages, once, twice, lost int
	unknown, unknownSent        int // according to the store, and how many of these the relay has
	mostOpen, refused           int // connections
}

// demo has three workers send messages, and kills one of them and a server.
func demo(ctx context.Context, out io.Writer, messages int) error {
	dir, err := os.MkdirTemp("", "cluster")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	relay := smtptest.NewUnstartedServer()
	relay.NoTLS, relay.NoAuth, relay.DropBodies, relay.Delay = true, true, true, 20*time.Millisecond
	relay.Start()
	defer relay.Close()

	children := &children{url: "smtp://" + relay.Addr() + "?tls=none"}
	defer children.end()
	urls, err := children.servers(dir)
	if err != nil {
		return err
	}
	for range 3 {
		if err := children.start("worker", "-nats", urls); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "Three NATS servers and three workers are running; the relay accepts %d connections.\n", connections)
	begun := time.Now()
	var l ledger
	err = withBox(urls, func(box *outbox.Outbox) error {
		for id, err := range box.EnqueueAll(ctx, func(yield func(outbox.Message) bool) {
			for i := range messages {
				if !yield(mail(i)) {
					return
				}
			}
		}) {
			if err != nil {
				return fmt.Errorf("enqueue %s: %w", id, err)
			}
		}
		fmt.Fprintf(out, "%5.1f s: %d messages are enqueued, and the relay has %d of them.\n", time.Since(begun).Seconds(), messages, relay.Stats().Accepted)
		for _, step := range []struct {
			share  int // of the messages, in percent
			victim int
			name   string
		}{{40, 3, "a worker"}, {60, 0, "a NATS server"}} {
			if err := relay.Wait(ctx, messages*step.share/100); err != nil {
				return err
			}
			children.kill(step.victim)
			fmt.Fprintf(out, "%5.1f s: the relay has %d; %s is killed.\n", time.Since(begun).Seconds(), relay.Stats().Accepted, step.name)
		}
		for left := true; left; {
			if left, err = some(ctx, box, outbox.Queued, outbox.Sending); err != nil {
				return err
			}
			select {
			case <-time.After(200 * time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		fmt.Fprintf(out, "%5.1f s: nothing is left to be sent.\n\n", time.Since(begun).Seconds())
		l, err = count(ctx, box, relay, messages)
		return err
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "messages                %5d\nthe relay has once      %5d\nthe relay has twice     %5d\nlost                    %5d\n", l.messages, l.once, l.twice, l.lost)
	fmt.Fprintf(out, "listed as unknown       %5d, of which the relay has %d: a person decides\n", l.unknown, l.unknownSent)
	fmt.Fprintf(out, "most connections open   %5d, refused %d\n", l.mostOpen, l.refused)
	if l.twice+l.lost > 0 {
		return errors.New("messages were lost or sent twice")
	}
	return nil
}

func mail(i int) outbox.Message {
	to := fmt.Sprintf("customer%d@example.org", i)
	text := fmt.Sprintf("From: <shop@example.com>\r\nTo: <%s>\r\nSubject: Your order no. %d\r\n\r\n%s", to, i, strings.Repeat("Thank you for your order.\r\n", 100))
	return outbox.Message{ID: fmt.Sprintf("order-%d", i), From: "shop@example.com", To: []string{to}, Body: smtprelay.Bytes([]byte(text))}
}

// some reports whether there are messages in one of the states.
func some(ctx context.Context, box *outbox.Outbox, states ...outbox.State) (bool, error) {
	for _, s := range states {
		for _, err := range box.List(ctx, s) {
			return err == nil, err
		}
	}
	return false, nil
}

// count compares the store with the relay's messages.
func count(ctx context.Context, box *outbox.Outbox, relay *smtptest.Server, messages int) (ledger, error) {
	stats := relay.Stats()
	l := ledger{messages: messages, mostOpen: stats.MaxOpen, refused: stats.Refused}
	has := map[string]int{}
	for _, m := range relay.Messages() {
		has[m.To[0]]++
	}
	for i := range messages {
		m := mail(i)
		item, err := box.Status(ctx, m.ID)
		if err != nil {
			return l, err
		}
		n := has[m.To[0]]
		switch {
		case n > 1:
			l.twice++
		case item.State == outbox.Unknown:
			l.unknown++
			l.unknownSent += n
		case n == 0:
			l.lost++
		}
		if n == 1 {
			l.once++
		}
	}
	return l, nil
}

// children are processes that run this program.
type children struct {
	url string // of the relay
	all []*child
}

type child struct {
	cmd   *exec.Cmd
	input io.Closer
}

// servers starts three NATS servers and returns their URLs.
func (c *children) servers(dir string) (urls string, err error) {
	var clients, routes []string
	for range 3 {
		for _, list := range []*[]string{&clients, &routes} {
			addr, err := freeAddr()
			if err != nil {
				return "", err
			}
			*list = append(*list, addr)
		}
	}
	for i := range 3 {
		name := fmt.Sprintf("node%d", i+1)
		if err := c.start("node", "-dir", filepath.Join(dir, name), "-name", name, "-listen", clients[i], "-cluster", routes[i], "-routes", strings.Join(routes, ",")); err != nil {
			return "", err
		}
	}
	return "nats://" + strings.Join(clients, ",nats://"), nil
}

// freeAddr is an unused address.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func (c *children) start(role string, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, append([]string{role, "-child"}, args...)...)
	cmd.Env = append(os.Environ(), "SMTP_URL="+c.url)
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	c.all = append(c.all, &child{cmd, input})
	return cmd.Start()
}

// kill kills a process, like the kernel's out-of-memory killer.
func (c *children) kill(i int) {
	_ = c.all[i].cmd.Process.Kill()
	_ = c.all[i].cmd.Wait()
}

// end ends all processes: the workers first.
func (c *children) end() {
	for i := len(c.all) - 1; i >= 0; i-- {
		_ = c.all[i].input.Close()
		_ = c.all[i].cmd.Wait()
	}
}
