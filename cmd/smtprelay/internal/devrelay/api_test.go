// The API as a test in another language uses it: messages, faults, connections and the certificate, over real connections.
package devrelay

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
)

func mailOf(to, subject string) smtprelay.Message {
	return smtprelay.Message{From: "shop@example.com", To: []string{to},
		Body: smtprelay.Bytes([]byte("From: Shop <shop@example.com>\r\nTo: " + to + "\r\nSubject: " + subject + "\r\n\r\nhello\r\n"))}
}

func TestFaultsAreSwitchedWhileTheRelayRuns(t *testing.T) {
	r := startRelay(t, nil)
	c := client(t, r)
	send := func() int {
		_, err := c.Send(t.Context(), mailOf("ann@example.org", "hi"))
		if e, ok := errors.AsType[*smtprelay.Error](err); ok {
			return e.Reply.Code
		}
		if err != nil {
			t.Fatal(err)
		}
		return 250
	}
	expect := func(what string, want int) {
		t.Helper()
		if got := send(); got != want {
			t.Errorf("%s: %d, want %d", what, got, want)
		}
	}
	expect("without a fault", 250)
	var f Fault
	if status, text := ask(t, r, "POST", "/api/v1/faults", map[string]any{"text": "rcpt=450 4.2.1 later"}, &f); status != 201 {
		t.Fatal(status, text)
	}
	if !f.On || f.At != "rcpt" || f.Reply != "450 4.2.1 later" {
		t.Errorf("the fault is %+v", f)
	}
	expect("on", 450)
	expect("still on", 450)
	ask(t, r, "PATCH", "/api/v1/faults/1", map[string]bool{"on": false}, &f)
	if f.On || f.Hits != 2 {
		t.Errorf("off: %+v", f)
	}
	expect("off", 250)
	ask(t, r, "PATCH", "/api/v1/faults/1", map[string]bool{"on": true}, nil)
	expect("on again", 450)
	if status, text := ask(t, r, "GET", "/api/v1/faults/1/wait?hits=3", nil, &f); status != 200 || f.Hits != 3 {
		t.Errorf("%d %s", status, text)
	}
	if status, text := ask(t, r, "GET", "/api/v1/faults/1/wait?hits=4&timeout=1ms", nil, nil); status != 504 {
		t.Errorf("%d %s", status, text)
	}
	ask(t, r, "DELETE", "/api/v1/faults/1", nil, nil)
	expect("deleted", 250)

	ask(t, r, "POST", "/api/v1/faults", FaultSpec{At: "dot", Reply: "554 5.7.1 spam", Count: 1}, nil)
	expect("by its fields", 554)
	expect("spent", 250)
	ask(t, r, "GET", "/api/v1/faults/2", nil, &f)
	if f.On || f.Hits != 1 {
		t.Errorf("spent: %+v", f)
	}
	ask(t, r, "PATCH", "/api/v1/faults/2", map[string]bool{"on": true}, &f)
	if !f.On || f.Hits != 0 {
		t.Errorf("a spent fault that is switched on begins anew: %+v", f)
	}
	expect("anew", 554)
	ask(t, r, "DELETE", "/api/v1/faults", nil, nil)
	expect("all deleted", 250)
	var refusals struct{ Refusals []Refusal }
	ask(t, r, "GET", "/api/v1/refusals", nil, &refusals)
	if len(refusals.Refusals) != 8 || refusals.Refusals[0].Reply != "554 5.7.1 spam" || refusals.Refusals[0].Command != ". (end of the message)" || !strings.HasPrefix(refusals.Refusals[7].Command, "RCPT TO:<ann@example.org>") {
		t.Errorf("refusals %+v", refusals.Refusals)
	}
}

func TestAFaultOfManyTimesGoesOnWhereItWasSwitchedOff(t *testing.T) {
	r := startRelay(t, nil)
	c := dialRaw(t, r)
	ask(t, r, "POST", "/api/v1/faults", map[string]string{"text": "noop=450 later; count=3"}, nil)
	got := c.say("NOOP")[:3]
	ask(t, r, "PATCH", "/api/v1/faults/1", map[string]bool{"on": false}, nil)
	ask(t, r, "PATCH", "/api/v1/faults/1", map[string]bool{"on": true}, nil)
	for range 4 {
		got += " " + c.say("NOOP")[:3]
	}
	if got != "450 450 450 250 250" {
		t.Errorf("replies %s", got)
	}
	if f, _ := r.faults.get(1); f.On || f.Hits != 3 {
		t.Errorf("%+v", f)
	}
}

func TestStallEndsWhenItIsSwitchedOff(t *testing.T) {
	r := startRelay(t, nil)
	ask(t, r, "POST", "/api/v1/faults", map[string]string{"text": "noop=stall"}, nil)
	c := dialRaw(t, r)
	reply := make(chan string)
	go func() { reply <- c.say("NOOP") }()
	if status, text := ask(t, r, "GET", "/api/v1/faults/1/wait", nil, nil); status != 200 {
		t.Fatal(status, text)
	}
	ask(t, r, "DELETE", "/api/v1/faults/1", nil, nil)
	if got := <-reply; !strings.HasPrefix(got, "250 ") {
		t.Errorf("%q", got)
	}
}

func TestWrongFaultsAreRefused(t *testing.T) {
	r := startRelay(t, nil)
	for _, in := range []any{
		map[string]any{"text": "nowhere=450 later"},
		map[string]any{"at": "rcpt"},
		map[string]any{"at": "rcpt", "reply": "450 a\r\n250 b"},
		map[string]any{"at": "rcpt", "reply": "450 later", "cuont": 1},
		map[string]any{"at": "rcpt", "text": "dot=drop"},
		map[string]any{"at": "rcpt", "drop": true, "nth": -1},
		map[string]any{},
	} {
		if status, text := ask(t, r, "POST", "/api/v1/faults", in, nil); status != 400 || !strings.Contains(text, `"error"`) {
			t.Errorf("%v: %d %s", in, status, text)
		}
	}
	for range maxFaults {
		ask(t, r, "POST", "/api/v1/faults", map[string]string{"text": "quit=drop"}, nil)
	}
	if status, _ := ask(t, r, "POST", "/api/v1/faults", map[string]string{"text": "quit=drop"}, nil); status != 409 {
		t.Errorf("one fault too many: %d", status)
	}
}

func TestMessagesAreWaitedForReadAndDeleted(t *testing.T) {
	r := startRelay(t, nil)
	c := client(t, r)
	type answer struct {
		status int
		text   string
		page   mailPage
	}
	waited := make(chan answer)
	go func() {
		var a answer
		a.status, a.text = ask(t, r, "GET", "/api/v1/messages/wait?n=2&to=BOB@example.org&timeout=1m", nil, &a.page)
		waited <- a
	}()
	var ids []string
	for _, to := range []string{"ann@example.org", "bob@example.org", "ann@example.org", "bob@example.org"} {
		receipt, err := c.Send(t.Context(), mailOf(to, "for "+to))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, receipt.QueueID)
	}
	if a := <-waited; a.status != 200 || len(a.page.Messages) != 2 || a.page.Messages[0].ID != ids[3] || a.page.Messages[1].ID != ids[1] {
		t.Fatalf("waited for two of bob's: %d %s", a.status, a.text)
	}
	if status, text := ask(t, r, "GET", "/api/v1/messages/wait?n=5&timeout=1ms", nil, nil); status != 504 || !strings.Contains(text, "4 of 5") {
		t.Errorf("%d %s", status, text)
	}

	var m struct {
		Mail
		Header []headerField
		Text   string
	}
	if status, text := ask(t, r, "GET", "/api/v1/messages/"+ids[0], nil, &m); status != 200 || m.Subject != "for ann@example.org" || m.Text != "hello\r\n" || m.From != "shop@example.com" || m.Header[0] != (headerField{"From", "Shop <shop@example.com>"}) {
		t.Errorf("%d %s", status, text)
	}
	if _, source := ask(t, r, "GET", "/api/v1/messages/"+ids[0]+"/source", nil, nil); !strings.HasSuffix(source, "\r\n\r\nhello\r\n") {
		t.Errorf("source %q", source)
	}

	var p mailPage
	ask(t, r, "GET", "/api/v1/messages?limit=3", nil, &p)
	if len(p.Messages) != 3 || !p.More || p.Total != 4 || p.Found != 4 || p.Messages[0].ID != ids[3] {
		t.Errorf("first page %+v", p)
	}
	ask(t, r, "GET", fmt.Sprintf("/api/v1/messages?limit=3&before=%d", p.Messages[2].Seq), nil, &p)
	if len(p.Messages) != 1 || p.More || p.Messages[0].ID != ids[0] {
		t.Errorf("last page %+v", p)
	}
	for query, want := range map[string]int{"q=BOB": 2, "subject=for+ann": 2, "from=shop@example.com": 4, "from=x": 0, "after=3": 1, "q=hello&to=ann@example.org": 2, "connection=99": 0} {
		ask(t, r, "GET", "/api/v1/messages?"+query, nil, &p)
		if p.Found != want && !(strings.HasPrefix(query, "after") && len(p.Messages) == want) || len(p.Messages) != want {
			t.Errorf("%s: %d found, %d listed, want %d", query, p.Found, len(p.Messages), want)
		}
	}

	var deleted struct{ Deleted int }
	ask(t, r, "DELETE", "/api/v1/messages?to=bob@example.org", nil, &deleted)
	if deleted.Deleted != 2 {
		t.Errorf("deleted %+v", deleted)
	}
	ask(t, r, "DELETE", "/api/v1/messages/"+ids[0], nil, nil)
	if status, _ := ask(t, r, "GET", "/api/v1/messages/"+ids[0], nil, nil); status != 404 {
		t.Errorf("a deleted message: %d", status)
	}
	ask(t, r, "GET", "/api/v1/messages", nil, &p)
	if len(p.Messages) != 1 || p.Messages[0].ID != ids[2] || p.Gone != 3 || p.Last != 4 {
		t.Errorf("left %+v", p)
	}
	ask(t, r, "DELETE", "/api/v1/messages", nil, &deleted)
	if deleted.Deleted != 1 || len(r.mails.byID) != 0 || r.mails.bytes != 0 {
		t.Errorf("%d deleted, %d by ID, %d octets left", deleted.Deleted, len(r.mails.byID), r.mails.bytes)
	}
}

// A filter that is spelt wrong must not delete everything.
func TestUnknownAndWrongParametersAreRefused(t *testing.T) {
	r := startRelay(t, nil)
	deliver(t, r, "Subject: kept\r\n\r\n")
	for _, path := range []string{"DELETE /api/v1/messages?subjekt=x", "GET /api/v1/messages?limit=0", "GET /api/v1/messages?limit=501", "GET /api/v1/messages?before=-1",
		"GET /api/v1/messages/wait?timeout=10", "GET /api/v1/messages/wait?timeout=11m", "GET /api/v1/messages/wait?n=0", "GET /api/v1/connections?limit=x"} {
		method, path, _ := strings.Cut(path, " ")
		if status, text := ask(t, r, method, path, nil, nil); status != 400 {
			t.Errorf("%s %s: %d %s", method, path, status, text)
		}
	}
	for _, path := range []string{"/api/v1/nothing", "/api/v1/messages/x", "/api/v1/messages/x/source", "/api/v1/messages/x/parts/1", "/mail/x/html", "/api/v1/connections/9", "/api/v1/faults/9", "/api/v1/faults/x", "/api/v1/certificate", "/page/index.html"} {
		if status, _ := ask(t, r, "GET", path, nil, nil); status != 404 {
			t.Errorf("GET %s: %d", path, status)
		}
	}
	if status, _ := ask(t, r, "DELETE", "/api/v1/faults/x", nil, nil); status != 404 {
		t.Errorf("DELETE of a fault that is no number: %d", status)
	}
	if r.mails.page(mailFilter{}, 0, 1).Total != 1 {
		t.Error("the message is gone")
	}
}

func TestDialogueHasTurnsRefusalsAndMessages(t *testing.T) {
	r := startRelay(t, nil)
	c := dialRaw(t, r)
	id := c.deliver("Subject: x\r\n\r\n")
	c.say("FOO")
	c.say("AUTH PLAIN c2VjcmV0") // not offered
	var got struct {
		Connection
		Lines []Line
	}
	ask(t, r, "GET", "/api/v1/connections/1", nil, &got)
	var b strings.Builder
	for _, l := range got.Lines[2:] {
		fmt.Fprintf(&b, "%d %s %s\n", l.Turn, l.Who, l.Text)
	}
	want := "1 client EHLO client.test\n1 relay 250-relay.test\n1 relay 250-8BITMIME\n1 relay 250-PIPELINING\n1 relay 250 SIZE 31457280\n" +
		"2 client MAIL FROM:<shop@example.com>\n2 relay 250 Sender address accepted\n2 client RCPT TO:<ann@example.org>\n2 relay 250 Recipient address accepted\n2 client DATA\n2 relay 354 Continue\n" +
		"3 client . (end of the message)\n3 note message of 16 octets taken\n3 relay 250 Ok: queued as " + id + "\n4 client FOO\n4 relay 500 5.5.2 Command not recognized\n5 client AUTH PLAIN [redacted]\n"
	if !strings.HasPrefix(b.String(), want) {
		t.Errorf("dialogue\n%swant\n%s", &b, want)
	}
	if got.Messages != 1 || got.Turns != 5 || got.Refusals != 2 || got.TLS || got.Closed != nil || got.Client != c.LocalAddr().String() {
		t.Errorf("connection %+v", got.Connection)
	}
	n := len(got.Lines)
	c.say("NOOP")
	ask(t, r, "GET", fmt.Sprintf("/api/v1/connections/1?after=%d", n), nil, &got)
	if len(got.Lines) != 2 || got.Lines[0].Text != "NOOP" {
		t.Errorf("what came since: %+v", got.Lines)
	}
	ask(t, r, "DELETE", "/api/v1/connections", nil, nil)
	if reply := c.reply(); reply != "" {
		t.Errorf("the connection was not cut: %q", reply)
	}
}

func TestLimitsAreThoseOfARelay(t *testing.T) {
	r := startRelay(t, func(c *Config) { c.MaxConns, c.MaxMessages, c.MaxRecipients, c.MaxSize = 1, 2, 1, 1000 })
	c := dialRaw(t, r)
	second := dialRaw(t, r) // greeted with 421
	if reply := second.reply(); reply != "" {
		t.Errorf("a second connection was not closed: %q", reply)
	}
	c.deliver("Subject: 1\r\n\r\n")
	c.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>")
	if reply := c.say("RCPT TO:<c@y.example>"); !strings.HasPrefix(reply, "452 ") {
		t.Errorf("a second recipient: %q", reply)
	}
	c.say("RSET")
	if reply := c.say("MAIL FROM:<a@x.example>"); !strings.HasPrefix(reply, "421 ") {
		t.Errorf("a third MAIL: %q", reply)
	}
	if st := r.state(); st.Refusals != 3 {
		t.Errorf("%d refusals", st.Refusals)
	}
}

func TestRateIsAFaultThatCanBeSwitchedOff(t *testing.T) {
	r := startRelay(t, func(c *Config) { c.Rate = 0.001 })
	c := dialRaw(t, r)
	c.deliver("Subject: 1\r\n\r\n")
	again := func() string {
		c.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		return c.say("x\r\n.")[:3]
	}
	if reply := again(); reply != "454" {
		t.Errorf("too fast: %q", reply)
	}
	ask(t, r, "PATCH", "/api/v1/faults/1", map[string]bool{"on": false}, nil)
	if reply := again(); reply != "250" {
		t.Errorf("without a rate: %q", reply)
	}
}

func TestTLSAndAUTHWorkWithTheURLAsPrinted(t *testing.T) {
	for _, mode := range []string{"none", "starttls", "implicit"} {
		t.Run(mode, func(t *testing.T) {
			r := startRelay(t, func(c *Config) { c.TLS, c.Username, c.Password = mode, "me", "se cret&" })
			if _, err := client(t, r).Send(t.Context(), mailOf("ann@example.org", "hi")); err != nil {
				t.Fatal(err)
			}
			var list struct{ Connections []Connection }
			ask(t, r, "GET", "/api/v1/connections", nil, &list)
			if list.Connections[0].TLS != (mode != "none") {
				t.Errorf("connection %+v", list.Connections[0])
			}
			status, text := ask(t, r, "GET", "/api/v1/certificate", nil, nil)
			if (status == 200 && strings.HasPrefix(text, "-----BEGIN CERTIFICATE-----")) != (mode != "none") {
				t.Errorf("certificate: %d %s", status, text)
			}
			if _, text := ask(t, r, "GET", "/api/v1/relay", nil, nil); strings.Contains(text, "se cret") || strings.Contains(text, "se%20cret") {
				t.Errorf("the page is told the password: %s", text)
			}
		})
	}
}

func TestEventsTellThatSomethingHasChanged(t *testing.T) {
	r := startRelay(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", web(r)+"/api/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	events := bufio.NewScanner(res.Body)
	next := func(is func(state) bool) {
		t.Helper()
		for events.Scan() {
			text, ok := strings.CutPrefix(events.Text(), "data: ")
			var s state
			if ok && json.Unmarshal([]byte(text), &s) == nil && is(s) {
				return
			}
		}
		t.Fatal("the stream has ended: ", events.Err())
	}
	next(func(s state) bool { return s.LastMessage == 0 })
	deliver(t, r, "Subject: x\r\n\r\n")
	next(func(s state) bool { return s.LastMessage == 1 && s.Messages == 1 })
	ask(t, r, "POST", "/api/v1/faults", map[string]string{"text": "quit=drop"}, nil)
	next(func(s state) bool { return s.FaultsOn == 1 })
}

// Close must not wait for those who wait for mail or events.
func TestCloseEndsThoseWhoWait(t *testing.T) {
	r := startRelay(t, nil)
	ended := make(chan struct{})
	req, err := http.NewRequestWithContext(t.Context(), "GET", web(r)+"/api/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(ended)
		defer res.Body.Close()
		for s := bufio.NewScanner(res.Body); s.Scan(); {
		}
	}()
	r.Close()
	<-ended
	r.Close() // and once more does nothing
}
