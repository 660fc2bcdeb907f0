// What is kept of messages and dialogues, that it is bounded, and that 10,000 messages are listed and searched quickly
// (go test -bench Mails).
package devrelay

import (
	"fmt"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

func numbered(n int) smtptest.Message {
	body := fmt.Sprintf("From: Shop <shop@example.com>\r\nTo: user%d@example.org\r\nSubject: Your order %d\r\n\r\n%sorder %d\r\n", n, n, strings.Repeat("It is on its way. ", 100), n)
	return smtptest.Message{ID: fmt.Sprintf("id-%d", n), Conn: 1, From: "shop@example.com", To: []string{fmt.Sprintf("user%d@example.org", n)}, Body: []byte(body), Size: int64(len(body))}
}

func TestOldMessagesMakeRoomForNewOnes(t *testing.T) {
	b := newMailbox(3, 1<<30, func() {})
	for n := range 10 {
		b.add(numbered(n))
	}
	p := b.page(mailFilter{}, 0, 10)
	if p.Total != 3 || p.Gone != 0 || p.First != 8 || p.Last != 10 || p.Messages[2].ID != "id-7" || len(b.byID) != 3 || b.get("id-6") != nil {
		t.Errorf("%+v, %d by ID", p, len(b.byID))
	}

	const room = 20_000
	b = newMailbox(1000, room, func() {})
	for n := range 100 {
		b.add(numbered(n))
	}
	if b.bytes > room || b.bytes < room/2 || b.page(mailFilter{}, 0, 1).Messages[0].ID != "id-99" {
		t.Errorf("%d octets are kept", b.bytes)
	}
	huge := numbered(100)
	huge.Body = append(huge.Body, make([]byte, 2*room)...)
	b.add(huge)
	if p := b.page(mailFilter{}, 0, 10); p.Total != 1 || p.Messages[0].ID != "id-100" {
		t.Errorf("a message of more than there is room for stays alone, until the next: %+v", p)
	}
	b.remove(func(*Mail) bool { return true })
	if b.bytes != 0 {
		t.Errorf("%d octets of nothing", b.bytes)
	}
}

func TestDialoguesAreForgotten(t *testing.T) {
	d := newDialogues(func() {})
	say := func(conn int, who, text string) { d.line(smtptest.Line{Conn: conn, Who: who, Text: text}) }
	say(1, "--", "opened by x") // and stays open
	for n := 2; n < 1000; n++ {
		say(n, "--", "opened by x")
		say(n, "S", "550 no")
		say(n, "--", "closed")
	}
	for range 2000 {
		say(1, "C", strings.Repeat("x", 60_000)+"\xff\x00")
	}
	if len(d.conns) != keepConns+1 || d.conns[0].N != 1 || len(d.refusals) != keepRefusals || d.refused != 998 {
		t.Errorf("%d connections, the first is %d, %d refusals of %d", len(d.conns), d.conns[0].N, len(d.refusals), d.refused)
	}
	c, lines, ok := d.get(1, 0)
	if !ok || len(lines) != keepLines || c.LineCount != 2001 || lines[len(lines)-1].N != 2001 || len(lines[0].Text) > longestLine+len("…") {
		t.Errorf("%d lines, %+v", len(lines), c)
	}
}

// filled is a mailbox of 10,000 messages.
func filled(b *testing.B) *mailbox {
	box := newMailbox(10_000, 1<<30, func() {})
	for n := range 10_000 {
		box.add(numbered(n))
	}
	b.ReportAllocs()
	b.ResetTimer()
	return box
}

func BenchmarkMailsListed(b *testing.B) {
	box := filled(b)
	for b.Loop() {
		box.page(mailFilter{}, 0, 50)
	}
}

func BenchmarkMailsSearched(b *testing.B) {
	box := filled(b)
	for b.Loop() {
		if p := box.page(mailFilter{text: "order 77 nowhere"}, 0, 50); p.Found != 0 {
			b.Fatal(p.Found)
		}
	}
}

func BenchmarkMailsAdded(b *testing.B) {
	box := newMailbox(10_000, 1<<30, func() {})
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		box.add(numbered(n))
	}
}
