package devrelay

import (
	"bytes"
	"encoding/base64"
	"html"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/emersion/go-message"
	nethtml "golang.org/x/net/html"
)

// HTML mail is hostile. What protects from it is where it is shown: on a path of its own, with mailPolicy, in a frame with an
// empty sandbox attribute, so that it has no scripts, no forms, no origin, no way to the page around it, and nothing to load
// but data URLs. The page's own policy lets the frame go nowhere but to the relay.
//
// Browsers do not apply a policy to all that a document can start: <link rel="preconnect"> and "dns-prefetch" open connections
// and ask name servers under any, and Chromium connects to where a link leads when it is clicked, before it finds that the frame
// may not go there. disarm takes such elements out, and has links lead nowhere. It is the second line of defence and no more.
const mailPolicy = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"

// disarmed are the elements that are taken out: those that speak to a server, to the browser or to a plug-in. What is between
// their tags stays, but for scripts.
var disarmed = map[string]bool{
	"animate": true, "applet": true, "base": true, "embed": true, "form": true, "frame": true, "frameset": true, "iframe": true, "link": true, "meta": true,
	"noembed": true, "noframes": true, "noscript": true, "object": true, "plaintext": true, "portal": true, "script": true, "set": true,
	"template": true, "xmp": true,
}

// taken stands in the place of what is taken out, so that what was before and after it does not become a tag together.
const taken = "<!---->"

// tagInText is what looks like a tag in a text that the tokenizer takes for raw, as in <style>. A browser may see it otherwise,
// within <svg>.
var tagInText = regexp.MustCompile(`<([a-zA-Z/?])`)

// plainName is the name of an attribute that may stay in a link.
var plainName = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)

// What is remembered of the links of a message.
const (
	maxLinks    = 500
	longestLink = 2000 // octets
)

// disarm returns HTML without comments and without the elements of disarmed, and with links that lead nowhere and say on their
// title where they led. All else is as it was. links are where they led, each once.
func disarm(in string) (out string, links []string) {
	var b bytes.Buffer
	z := nethtml.NewTokenizer(strings.NewReader(in))
	script := false // the text that comes belongs to a script
	for {
		kind := z.Next()
		switch kind {
		case nethtml.ErrorToken: // io.EOF: there is no other, since the text is in memory
			return b.String(), links
		case nethtml.TextToken:
			if !script {
				b.Write(tagInText.ReplaceAll(z.Raw(), []byte("< $1")))
			}
			script = false
		case nethtml.CommentToken:
			b.WriteString(taken)
		default:
			raw := bytes.Clone(z.Raw())
			tag, hasAttr := z.TagName()
			name := string(tag)
			script = kind == nethtml.StartTagToken && name == "script"
			switch {
			case disarmed[name]:
				b.WriteString(taken)
			case hasAttr && (name == "a" || name == "area"):
				if link := writeLink(&b, name, z); link != "" && len(links) < maxLinks && len(link) <= longestLink && !slices.Contains(links, link) {
					links = append(links, link)
				}
			default:
				b.Write(raw)
			}
		}
	}
}

// writeLink writes a link that leads nowhere, and returns where it led.
func writeLink(b *bytes.Buffer, name string, z *nethtml.Tokenizer) (led string) {
	b.WriteString("<" + name)
	for more := true; more; {
		var key, value []byte
		key, value, more = z.TagAttr()
		switch k := string(key); {
		case k == "href" || k == "xlink:href":
			if led == "" {
				led = strings.TrimSpace(string(value))
			}
		case k != "target" && k != "ping" && k != "title" && plainName.MatchString(k):
			b.WriteString(" " + k + `="` + html.EscapeString(string(value)) + `"`)
		}
	}
	if led != "" {
		b.WriteString(` href="#" title="` + html.EscapeString(strings.ToValidUTF8(led, "\uFFFD")) + `"`)
	}
	b.WriteString(">")
	return led
}

// showable are the types of images that may be put into HTML. In a picture SVG runs no scripts and loads nothing.
var showable = map[string]bool{"image/png": true, "image/jpeg": true, "image/gif": true, "image/webp": true, "image/bmp": true, "image/svg+xml": true}

// imageRef is a reference to a part by its Content-ID (RFC 2392).
var imageRef = regexp.MustCompile(`["']cid:([^"'<>\s]{1,500})["']`)

// withImages puts the images that HTML refers to by their Content-ID into it, as data URLs, as far as maxInline goes.
func withImages(page string, body []byte) string {
	images := map[string]string{} // by Content-ID; "" is one that the page wants
	for _, ref := range imageRef.FindAllStringSubmatch(page, -1) {
		images[html.UnescapeString(ref[1])] = ""
	}
	if len(images) == 0 {
		return page
	}
	room := maxInline
	eachPart(body, func(n int, e *message.Entity) error {
		mediaType, _, _ := e.Header.ContentType()
		id := strings.Trim(e.Header.Get("Content-Id"), "<> ")
		if data, wanted := images[id]; n == 0 || !wanted || data != "" || !showable[mediaType] {
			return nil
		}
		image, err := io.ReadAll(io.LimitReader(e.Body, int64(room)))
		images[id] = "data:" + mediaType + ";base64," + base64.StdEncoding.EncodeToString(image)
		return err
	})
	return imageRef.ReplaceAllStringFunc(page, func(ref string) string {
		id := html.UnescapeString(ref[len(`"cid:`) : len(ref)-1])
		data := images[id]
		if data == "" || len(data) > room {
			return ref
		}
		room -= len(data)
		return ref[:1] + data + ref[len(ref)-1:]
	})
}
