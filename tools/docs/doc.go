// Package docs tests the Markdown files of this repository. It has no code of its own. It is a separate module, so that the other
// modules do not depend on the libraries that the pages use.
package docs
