// What outbox shows and does, on each kind of store, while the service that has the store open works; what it says where it cannot, and
// its exit statuses.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
	"github.com/smtprelay/smtprelay/outbox/sqlitestore"
	"github.com/smtprelay/smtprelay/smtptest"
)

// place is a store that a service has open, and the setting that names it.
type place struct {
	*testing.T
	store   outbox.Store
	setting string
}

// onEachStore runs a test on each kind of store.
func onEachStore(t *testing.T, test func(p *place)) {
	t.Run("sqlitestore", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "out box") // a name with a space
		store, err := sqlitestore.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		test(&place{t, store, dir})
	})
	t.Run("natsstore", func(t *testing.T) {
		server := startNATS(t, embedded.Config{})
		nc, err := server.Connect()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		store, err := natsstore.New(nc, natsstore.Options{Name: "shop"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		test(&place{t, store, server.URL() + "/shop"})
	})
}

func startNATS(t *testing.T, c embedded.Config) *embedded.Server {
	t.Helper()
	c.Dir, c.Listen = t.TempDir(), "127.0.0.1:0"
	server, err := embedded.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	return server
}

// put adds a message in a state.
func (p *place) put(id string, state outbox.State, set ...func(*outbox.Item)) {
	p.Helper()
	now := time.Now()
	i := outbox.Item{ID: id, From: "shop@example.com", To: []string{"ann@example.org"}, Created: now, Due: now, Changed: now}
	for _, f := range set {
		f(&i)
	}
	body := smtprelay.Bytes([]byte("Subject: " + id + "\r\nFrom: shop\r\n\r\nsecret\r\n"))
	if err := p.store.Put(p.Context(), []outbox.Entry{{Item: i, Body: body}})[0]; err != nil {
		p.Fatal(err)
	}
	if err := p.store.Change(p.Context(), id, func(i *outbox.Item) error { i.State = state; return nil }); err != nil {
		p.Fatal(err)
	}
}

func (p *place) is(id string, want outbox.State) {
	p.Helper()
	i, err := p.store.Get(p.Context(), id)
	if err != nil || i.State != want {
		p.Errorf("%s is %v, %v; want %v", id, i.State, err, want)
	}
}

// outboxRun runs "smtprelay outbox" with a setting from the environment.
func outboxRun(t *testing.T, setting string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Setenv("SMTPRELAY_OUTBOX", setting)
	var out, errs strings.Builder
	code = run(t.Context(), append([]string{"smtprelay", "outbox"}, args...), strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// run runs the command on the store, and wants an exit status and texts in what it writes.
func (p *place) run(code int, args []string, wants ...string) string {
	p.Helper()
	got, stdout, stderr := outboxRun(p.T, p.setting, args...)
	if got != code {
		p.Errorf("%q: exit status %d, want %d: %s", args, got, code, stderr)
	}
	for _, want := range wants {
		if !strings.Contains(stdout+stderr, want) {
			p.Errorf("%q: without %q: %s%s", args, want, stdout, stderr)
		}
	}
	return stdout
}

func words(line string) []string { return strings.Fields(line) }

// ids are those of JSON lines, in order.
func (p *place) ids(lines string) (ids []string) {
	p.Helper()
	for line := range strings.Lines(lines) {
		var i struct{ ID string }
		if err := json.Unmarshal([]byte(line), &i); err != nil {
			p.Fatalf("%q: %v", line, err)
		}
		ids = append(ids, i.ID)
	}
	return ids
}

func TestOutboxListShowsWhatNeedsAPersonFirstAndFilters(t *testing.T) {
	onEachStore(t, func(p *place) {
		p.put("q1", outbox.Queued)
		p.put("q2", outbox.Queued, func(i *outbox.Item) { i.Tenant, i.To = "shop", []string{"bob@Example.net", "ann@example.org"} })
		p.put("d1", outbox.Dead, func(i *outbox.Item) { i.Tenant, i.Reason = "shop", `550 5.1.1 "no such user"` })
		p.put("u1", outbox.Unknown, func(i *outbox.Item) {
			i.To, i.Fates = nil, []outbox.Fate{{To: "carl@example.net", Outcome: smtprelay.Unknown}}
		})
		p.put("a1", outbox.Accepted)
		for _, test := range []struct{ args, want string }{
			{"", "u1 d1 q1 q2"},
			{"--state dead,queued", "d1 q1 q2"},
			{"--state accepted", "a1"},
			{"--tenant shop", "d1 q2"},
			{"--tenant=", "u1 q1"},
			{"--to BOB@example.net", "q2"},
			{"--to @example.net", "u1 q2"},
			{"--to example.net", ""},
			{"--limit 2", "u1 d1"},
			{"--limit 0", "u1 d1 q1 q2"},
		} {
			out := p.run(0, words("list --json "+test.args))
			if got := strings.Join(p.ids(out), " "); got != test.want {
				p.Errorf("list %s: %s; want %s", test.args, got, test.want)
			}
		}
		p.run(0, words("list"), "STATE", "unknown  u1", `550 5.1.1 "no such user"`, "bob@Example.net +1")
		for _, wrong := range []string{"--state deaf", "--limit -1", "--after q1", "--after queued/"} {
			p.run(exitUsage, words("list "+wrong), strings.Fields(wrong)[0])
		}
	})
}

func TestOutboxListIsInPagesThatMeet(t *testing.T) {
	onEachStore(t, func(p *place) {
		var want, got []string
		for _, state := range []outbox.State{outbox.Unknown, outbox.Queued} {
			for k := range 5 {
				id := fmt.Sprintf("%v's %d", state, k) // a quote, for the shell
				p.put(id, state)
				want = append(want, id)
			}
		}
		args := words("list --json --limit 3")
		for more := true; more; {
			code, out, stderr := outboxRun(p.T, p.setting, args...)
			if code != 0 {
				p.Fatal(stderr)
			}
			got = append(got, p.ids(out)...)
			var after string
			if _, after, more = strings.Cut(stderr, "--after "); more {
				args = append(words("list --json --limit 3 --after"), strings.ReplaceAll(strings.Trim(strings.TrimSpace(after), "'"), `'\''`, "'"))
			}
		}
		if !slices.Equal(got, want) {
			p.Errorf("got %q, want %q", got, want)
		}
		if err := p.store.Change(p.Context(), "queued's 1", func(i *outbox.Item) error { i.State = outbox.Dead; return nil }); err != nil {
			p.Fatal(err)
		}
		p.run(exitNotPossible, []string{"list", "--after", "queued/queued's 1"}, "not queued any more", "from the start")
	})
}

func TestOutboxShowTellsAllButTheBody(t *testing.T) {
	onEachStore(t, func(p *place) {
		p.put("o1", outbox.Dead, func(i *outbox.Item) {
			i.Attempts, i.Reason, i.Tenant = 3, "the reason", "shop"
			i.Fates = []outbox.Fate{{To: "ann@example.org", Outcome: smtprelay.NotAccepted, Code: 550, Reply: `550 5.1.1 "no such user"`, QueueID: "Q7"}}
		})
		out := p.run(0, words("show o1"), "dead since", "the reason", "shop", "<shop@example.com>", "ann@example.org", `550 5.1.1 "no such user"`, "Q7", "  Subject: o1", "  From: shop")
		if strings.Contains(out, "secret") {
			p.Errorf("the body is shown: %s", out)
		}
		var got struct {
			ID, State, Header string
			Attempts          int
			Recipients        []struct{ Reply string }
		}
		out = p.run(0, words("show o1 --json"))
		if err := json.Unmarshal([]byte(out), &got); err != nil || got.State != "dead" || got.Attempts != 3 || got.Header != "Subject: o1\r\nFrom: shop\r\n" || got.Recipients[0].Reply == "" {
			p.Errorf("%v: %s", err, out)
		}
		if out := p.run(0, words("show o1 --body")); out != "Subject: o1\r\nFrom: shop\r\n\r\nsecret\r\n" {
			p.Errorf("the body is %q", out)
		}
		p.run(exitUsage, words("show o1 --body --json"), "--json")
		p.run(exitUsage, words("show"), "usage: smtprelay outbox ")
		p.run(exitNotPossible, words("show none"), `no message "none"`, "outbox list")
	})
}

func TestOutboxOutputDoesNothingToATerminal(t *testing.T) {
	onEachStore(t, func(p *place) {
		const evil = "x\x1b]0;owned\a\u009b2J\n\u202e"
		p.put(evil, outbox.Dead, func(i *outbox.Item) {
			i.Tenant, i.Reason, i.From, i.To = evil, evil, evil, []string{evil}
			i.Fates = []outbox.Fate{{To: evil, Reply: evil, QueueID: evil}}
		})
		out := p.run(0, words("list")) + p.run(0, []string{"show", evil}) + p.run(0, []string{"resolve", evil, "drop"})
		if strings.ContainsAny(out, "\x1b\a\u009b\u202e") {
			p.Errorf("got %q", out)
		}
	})
}

func TestOutboxResolveDoesWhatItIsTold(t *testing.T) {
	onEachStore(t, func(p *place) {
		for verdict, want := range map[string]outbox.State{"sent": outbox.Accepted, "resend": outbox.Queued, "drop": outbox.Cancelled} {
			for _, state := range []outbox.State{outbox.Unknown, outbox.Dead} {
				id := verdict + "-" + state.String()
				p.put(id, state)
				p.run(0, []string{"resolve", id, verdict}, id+": "+want.String())
				p.is(id, want)
			}
		}
		p.put("q", outbox.Queued)
		p.run(exitNotPossible, words("resolve q drop"), `"q" is queued`, "want unknown or dead", "outbox cancel")
		p.is("q", outbox.Queued)
		p.run(exitNotPossible, words("resolve none sent"), `no message "none"`)
		p.run(exitUsage, words("resolve q maybe"), `"maybe"`, "sent, resend or drop")
		p.run(exitUsage, words("resolve q"), "usage: smtprelay outbox ")
	})
}

func TestOutboxRequeueTakesWhatIsDeadAlone(t *testing.T) {
	onEachStore(t, func(p *place) {
		for state, hint := range map[outbox.State]string{outbox.Unknown: "outbox resolve", outbox.Queued: "want dead", outbox.Accepted: "want dead", outbox.Sending: "wait"} {
			p.put(state.String(), state)
			p.run(exitNotPossible, []string{"requeue", state.String()}, "is "+state.String(), hint)
			p.is(state.String(), state)
		}
		p.put("dead", outbox.Dead)
		p.run(0, words("requeue dead"), "dead: queued")
		p.is("dead", outbox.Queued)
		p.run(exitNotPossible, words("requeue none"), `no message "none"`)
	})
}

func TestOutboxCancelTakesWhatIsQueuedAlone(t *testing.T) {
	onEachStore(t, func(p *place) {
		p.put("q", outbox.Queued)
		p.run(0, words("cancel q"), "q: cancelled")
		p.is("q", outbox.Cancelled)
		for state, hint := range map[outbox.State]string{outbox.Unknown: "outbox resolve", outbox.Dead: "outbox requeue", outbox.Accepted: "want queued", outbox.Sending: "wait"} {
			p.put(state.String(), state)
			p.run(exitNotPossible, []string{"cancel", state.String()}, "is "+state.String(), hint)
			p.is(state.String(), state)
		}
		p.run(exitNotPossible, words("cancel none"), `no message "none"`)
	})
}

func TestOutboxStatsCounts(t *testing.T) {
	onEachStore(t, func(p *place) {
		for state, n := range map[outbox.State]int{outbox.Queued: 4, outbox.Sending: 3, outbox.Unknown: 2, outbox.Dead: 1, outbox.Accepted: 5} {
			for k := range n {
				p.put(fmt.Sprint(state, k), state, func(i *outbox.Item) { i.Due = i.Due.Add(-time.Hour) })
			}
		}
		p.run(0, words("stats"), "queued   4", "sending  3", "unknown  2", "dead     1", "1h0m")
		var c counts
		if out := p.run(0, words("stats --json")); json.Unmarshal([]byte(out), &c) != nil || c.Queued != 4 || c.Sending != 3 || c.Unknown != 2 || c.Dead != 1 || c.Oldest < 3600 {
			p.Errorf("got %s", out)
		}
	})
}

// lineCounter ends a context when it has so many lines.
type lineCounter struct {
	bytes.Buffer
	most int
	end  func()
}

func (l *lineCounter) Write(p []byte) (int, error) {
	n, err := l.Buffer.Write(p)
	if bytes.Count(l.Bytes(), []byte("\n")) >= l.most {
		l.end()
	}
	return n, err
}

func TestOutboxWatchCountsUntilItIsTold(t *testing.T) {
	onEachStore(t, func(p *place) {
		p.put("q", outbox.Queued)
		p.Setenv("SMTPRELAY_OUTBOX", p.setting)
		for _, args := range []string{"", " --json"} {
			ctx, end := context.WithCancel(p.Context())
			out := &lineCounter{most: 3, end: end}
			if code := run(ctx, words("smtprelay outbox watch --every 1ms"+args), nil, out, io.Discard); code != 0 {
				p.Errorf("exit status %d", code)
			}
			end()
			for line := range strings.Lines(out.String()) {
				var c counts
				if args != "" && (json.Unmarshal([]byte(line), &c) != nil || c.Queued != 1) || args == "" && !strings.Contains(line, "queued 1  sending 0") {
					p.Errorf("got %q", line)
				}
			}
		}
		p.run(exitUsage, words("watch --every 0s"), "--every")
	})
}

// A service sends while the command decides: nothing is sent twice, and what was cancelled is not sent.
func TestOutboxIsSafeBesideAWorker(t *testing.T) {
	onEachStore(t, func(p *place) {
		relay := smtptest.New(p.T)
		client, err := smtprelay.New(relay.Config())
		if err != nil {
			p.Fatal(err)
		}
		defer client.Close()
		box, err := outbox.New(outbox.Config{Store: p.store, Client: client})
		if err != nil {
			p.Fatal(err)
		}
		p.put("dead", outbox.Dead) // before the worker begins: it is queued for a moment, and would be sent
		ctx, stop := context.WithCancel(p.Context())
		ended := make(chan error, 1)
		go func() { ended <- box.Run(ctx) }()
		const n = 30
		cancelled := 0
		for k := range n {
			id := fmt.Sprint(k)
			if err := box.Enqueue(p.Context(), outbox.Message{ID: id, From: "shop@example.com", To: []string{"ann@example.org"}, Body: smtprelay.Bytes([]byte("Subject: x\r\n\r\n" + id + "\r\n"))}); err != nil {
				p.Fatal(err)
			}
			if k%3 == 0 {
				switch code, _, stderr := outboxRun(p.T, p.setting, "cancel", id); code {
				case 0:
					cancelled++
				case exitNotPossible:
				default:
					p.Errorf("exit status %d: %s", code, stderr)
				}
			}
		}
		p.run(0, words("requeue dead"))
		for c := (outbox.Counts{Queued: 1}); c.Queued+c.Sending > 0; {
			if c, err = p.store.Count(p.Context()); err != nil {
				p.Fatal(err)
			}
		}
		stop()
		if err := <-ended; err != nil {
			p.Error(err)
		}
		if s := relay.Stats(); s.Accepted != n+1-cancelled || s.Duplicates != 0 {
			p.Errorf("%d were cancelled, and the relay has %d of %d, %d of them twice", cancelled, s.Accepted, n+1, s.Duplicates)
		}
	})
}

func TestOutboxStoreThatIsNotThereIsNamedAndNotCreated(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "typo")
	server := startNATS(t, embedded.Config{Token: "s3cret"})
	withToken := strings.Replace(server.URL(), "nats://", "nats://s3cret@", 1)
	for setting, want := range map[string]string{
		dir:                    "there is no store in",
		withToken + "/typo":    `no stream "typo"`,
		withToken:              `no stream "outbox"`,
		server.URL():           "not reached", // no token
		"nats://127.0.0.1:1/x": "not reached",
	} {
		for _, args := range []string{"list", "show x", "resolve x sent", "requeue x", "cancel x", "watch", "stats"} {
			code, stdout, stderr := outboxRun(t, setting, words(args)...)
			if code != exitStore || !strings.Contains(stderr, want) || strings.Contains(stdout+stderr, "s3cret") {
				t.Fatalf("%s, %s: exit status %d, want %d and %q: %s%s", setting, args, code, exitStore, want, stdout, stderr)
			}
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder: %v", err)
	}
}

func TestOutboxWrongSettingsAreUsage(t *testing.T) {
	for setting, want := range map[string]string{
		"":                                    "SMTPRELAY_OUTBOX",
		"redis://h":                           "redis",
		"nats://u:s3cret@h:port":              "cannot be parsed",
		"nats:///x":                           "cannot be parsed",
		"nats://a/x,nats://b":                 "last server",
		"nats://h?token=s3cret":               "token",
		"nats://h?creds=/does/not/exist":      "creds",
		"nats://h?cert=" + os.DevNull:         "cert and key",
		"nats://u:s3cret@h,nats://h?ca=/none": "ca",
	} {
		code, stdout, stderr := outboxRun(t, setting, "stats")
		if code != exitUsage || !strings.Contains(stderr, want) || strings.Contains(stdout+stderr, "s3cret") {
			t.Errorf("%s: exit status %d, want %d and %q: %s%s", setting, code, exitUsage, want, stdout, stderr)
		}
	}
	// On the command line others can read it.
	for _, setting := range []string{"nats://u:s3cret@h", "nats://s3cret@h", "nats://h,nats://s3cret@h", "nats://u:s3cret@h:port"} {
		code, stdout, stderr := outboxRun(t, "", "stats", "--store", setting)
		if code != exitUsage || !strings.Contains(stderr, "SMTPRELAY_OUTBOX") || strings.Contains(stdout+stderr, "s3cret") {
			t.Errorf("%s: exit status %d: %s%s", setting, code, stdout, stderr)
		}
	}
	if code, _, stderr := outboxRun(t, "x", "lsit"); code != exitUsage {
		t.Errorf("exit status %d: %s", code, stderr)
	}
}

func TestOutboxStoreFlagCountsBeforeTheEnvironment(t *testing.T) {
	dir := t.TempDir()
	store, err := sqlitestore.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if code, _, stderr := outboxRun(t, "nats://127.0.0.1:1", "stats", "--store", dir); code != 0 {
		t.Errorf("exit status %d: %s", code, stderr)
	}
}
